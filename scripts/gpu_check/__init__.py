"""Ask a machine with an NVIDIA GPU what kvd's design must know of it (`make gpu-check`).

It stands alone: Python 3.10 or newer, the standard library, and the CUDA driver through ctypes. The folder and the script beside
it can be copied to a bare machine. Every section runs in a process of its own under a deadline, because a driver call can crash
or hang (vLLM's issue 49276 reports both of batched copies of very many pieces), and the other answers must still come out. Every
copy is checked for the right bytes, in an extra, untimed run over poisoned memory.

Host memory stays under 8 GiB, device memory under 4 GiB, and the whole run under 5 minutes.

Deliberately absent: kernels, kvd itself (but for the checksum of a given wheel), and any change of a GPU setting. The only thing
changed on the machine is the huge page pool, when that is allowed, and it is put back.

Exit: 0 all right, 1 wrong bytes or a section that died, 2 wrong use, 3 no driver or no GPU.
"""
