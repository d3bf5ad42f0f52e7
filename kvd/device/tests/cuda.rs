//! The CUDA adapter holds what every adapter must, on a real GPU (`make gpu-test`); and without a driver it says so.

use kvd_device::conformance;
use kvd_device::{CudaDevice, Device, Error, StreamHandle};

#[test]
fn without_a_driver_there_is_a_reason() {
    // On a machine with a GPU nothing is missing but the 1000th one.
    let Err(Error::Failed(reason)) = CudaDevice::open(1000) else {
        panic!("nobody has so many");
    };
    assert!(reason.starts_with("CUDA: "), "{reason}");
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu-test"]
fn the_cuda_device_conforms() {
    let device = CudaDevice::open(0).expect("a GPU");
    conformance::run(&device, &mut device.memory());
    conformance::too_large(&device, &mut device.memory(), 8 << 20);
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu-test"]
fn calls_of_several_threads_do_not_disturb_each_other() {
    let device = CudaDevice::open(0).expect("a GPU");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| conformance::run(&device, &mut device.memory()));
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu-test"]
fn memory_is_registered_once_and_given_back() {
    let device = CudaDevice::open(0).expect("a GPU");
    let arena = kvd_arena::Arena::create(64 << 20, Some(2 << 20), kvd_arena::HugePages::Auto)
        .expect("an arena");
    let fd = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().expect("dup");
    let view = kvd_arena::ArenaView::map(fd(arena.fd()), fd(arena.generation_fd()), arena.shape())
        .expect("a view");
    let (address, bytes) = view.region();
    for _ in 0..2 {
        let registered = device.register(address, bytes).expect("registered");
        assert!(registered.is_some());
        let again = device.register(address, bytes);
        assert!(matches!(again, Err(Error::Failed(_))), "it is known");
    }
    device
        .point(StreamHandle::DEFAULT)
        .expect("a point")
        .wait()
        .expect("passed");
}
