//! The CUDA driver, as little of it as is needed: what must be given back gives itself back, and every error names the call.
//!
//! The library is opened at run time (cudarc), so that this crate builds and runs without it. Everything happens in a device's
//! primary context, the one that the engine's framework uses too.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::Error;

/// `cuMemcpyBatchAsync` as of CUDA 12.8; 13.0 has another one by the same name, and gives this one to who asks for it.
type BatchCopy = unsafe extern "C" fn(
    *const u64,
    *const u64,
    *const usize,
    usize,
    *const CopyAttributes,
    *const usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> sys::CUresult;

/// `CUmemcpyAttributes`: access in stream order, no hints.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct CopyAttributes {
    order: u32,
    hints: [u32; 4],
    flags: u32,
}

/// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`
const ORDER_STREAM: u32 = 1;
const BATCH_SINCE: i32 = 12080;
/// What reads the kernel's PTX, and has all calls that are made here.
const DRIVER_SINCE: i32 = 12010;
/// Pieces of one batched call. More of them were slower on an H200: 64 KiB pieces at 0.95 of the link in calls of 32, and at 0.75
/// in calls of 4096.
const BATCH: usize = 32;
/// About half a microsecond each.
const LOOKS: u32 = 300;

/// Fails with what the driver says of `code`.
pub(super) fn check(what: &str, code: sys::CUresult) -> Result<(), Error> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = ptr::null();
    // SAFETY: the place is ours; the driver gives a static string, or nothing.
    let known = unsafe { sys::cuGetErrorName(code, &mut name) } == sys::CUresult::CUDA_SUCCESS;
    let name = match known && !name.is_null() {
        // SAFETY: a static string, as the driver says.
        true => unsafe { CStr::from_ptr(name) }.to_string_lossy(),
        false => format!("error {}", code as u32).into(),
    };
    Err(Error::Failed(format!("CUDA: {what}: {name}")))
}

/// A value that a call of the driver writes.
fn given<T>(what: &str, call: impl FnOnce(*mut T) -> sys::CUresult) -> Result<T, Error> {
    let mut place = MaybeUninit::zeroed();
    check(what, call(place.as_mut_ptr()))?;
    // SAFETY: the driver has written it; and all that is asked for here may be zero.
    Ok(unsafe { place.assume_init() })
}

/// One device's primary context, kept alive.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    batch: Option<BatchCopy>,
}

// SAFETY: contexts may be used from any thread; `enter` makes them current where they are used.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks for itself.
unsafe impl Sync for Context {}

/// A context is current on this thread as long as this lives.
pub(super) struct Entered<'a> {
    context: &'a Arc<Context>,
    /// What this thread's calls may do while somebody captures a graph, to be put back.
    capture: sys::CUstreamCaptureMode,
    /// Current is a property of a thread.
    thread: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        // SAFETY: puts back and pops what `enter` has set and pushed.
        unsafe {
            let _ = sys::cuThreadExchangeStreamCaptureMode(&mut self.capture);
            let _ = sys::cuCtxPopCurrent_v2(ptr::null_mut());
        }
    }
}

impl Context {
    /// The primary context of the device with this number, as the process sees devices.
    pub(super) fn open(ordinal: u32) -> Result<Self, Error> {
        // SAFETY: opens a library by name, whose initialisers are the vendor's.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Failed(
                "CUDA: libcuda.so.1 can't be opened: is NVIDIA's driver here, and given to this container?".into(),
            ));
        }
        // SAFETY: no arguments that could be wrong, and places of the right types.
        unsafe {
            check("cuInit", sys::cuInit(0))?;
            let version = given("cuDriverGetVersion", |v| sys::cuDriverGetVersion(v))?;
            if version < DRIVER_SINCE {
                return Err(Error::Failed(format!(
                    "CUDA: the driver is one of CUDA {}.{}; 12.1 or newer is needed",
                    version / 1000,
                    version % 1000 / 10
                )));
            }
            let device = given("cuDeviceGet", |d| sys::cuDeviceGet(d, ordinal as i32))?;
            let context = given("cuDevicePrimaryCtxRetain", |c| {
                sys::cuDevicePrimaryCtxRetain(c, device)
            })?;
            let mut batch: *mut c_void = ptr::null_mut();
            let name = c"cuMemcpyBatchAsync";
            let found = sys::cuGetProcAddress_v2(
                name.as_ptr(),
                &mut batch,
                BATCH_SINCE,
                0,
                ptr::null_mut(),
            );
            let there = found == sys::CUresult::CUDA_SUCCESS && !batch.is_null();
            // What the driver gives for this version has this type.
            let batch = there.then(|| std::mem::transmute::<*mut c_void, BatchCopy>(batch));
            Ok(Self {
                device,
                context,
                batch,
            })
        }
    }

    pub(super) fn enter(self: &Arc<Self>) -> Result<Entered<'_>, Error> {
        // SAFETY: the context is retained until `self` is dropped.
        check("cuCtxPushCurrent", unsafe {
            sys::cuCtxPushCurrent_v2(self.context)
        })?;
        // The engine may be capturing a graph: calls of this thread have nothing to do with it, and must neither fail nor spoil it.
        let mut capture = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a place of the right type.
        let exchanged = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut capture) };
        if let Err(error) = check("cuThreadExchangeStreamCaptureMode", exchanged) {
            // SAFETY: pops what was just pushed.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(ptr::null_mut()) };
            return Err(error);
        }
        Ok(Entered {
            context: self,
            capture,
            thread: PhantomData,
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: gives back what `open` has retained.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl Entered<'_> {
    /// Tells the driver of memory of this process, so that the device reaches it by itself.
    pub(super) fn register(&self, address: usize, bytes: usize) -> Result<HostRange, Error> {
        // SAFETY: registering reads and writes nothing.
        check("cuMemHostRegister", unsafe {
            let flags = sys::CU_MEMHOSTREGISTER_PORTABLE;
            sys::cuMemHostRegister_v2(address as *mut c_void, bytes, flags)
        })?;
        Ok(HostRange {
            address,
            context: Arc::clone(self.context),
        })
    }

    /// A stream that waits for no other, of the lowest priority: the engine's kernels come first.
    pub(super) fn stream(&self) -> Result<Stream, Error> {
        // SAFETY: places of the right types.
        let raw = unsafe {
            let least = given("cuCtxGetStreamPriorityRange", |least| {
                sys::cuCtxGetStreamPriorityRange(least, ptr::null_mut())
            })?;
            given("cuStreamCreateWithPriority", |s| {
                let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
                sys::cuStreamCreateWithPriority(s, flags, least)
            })?
        };
        Ok(Stream {
            raw,
            context: Arc::clone(self.context),
        })
    }

    /// A stream that waits for no other, of the usual priority.
    pub(super) fn usual_stream(&self) -> Result<Stream, Error> {
        // SAFETY: a place of the right type.
        let raw = given("cuStreamCreate", |s| unsafe {
            sys::cuStreamCreate(s, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32)
        })?;
        Ok(Stream {
            raw,
            context: Arc::clone(self.context),
        })
    }

    /// An event for order, not for time; who waits for it sleeps.
    pub(super) fn event(&self) -> Result<Event, Error> {
        use sys::CUevent_flags::{CU_EVENT_BLOCKING_SYNC, CU_EVENT_DISABLE_TIMING};
        let flags = CU_EVENT_BLOCKING_SYNC as u32 | CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: a place of the right type.
        let raw = given("cuEventCreate", |e| unsafe { sys::cuEventCreate(e, flags) })?;
        Ok(Event {
            raw,
            context: Arc::clone(self.context),
        })
    }

    /// Device memory, not initialised.
    pub(super) fn allocate(&self, bytes: usize) -> Result<DeviceMemory, Error> {
        // SAFETY: a place of the right type.
        let address = given("cuMemAlloc", |a| unsafe { sys::cuMemAlloc_v2(a, bytes) })?;
        Ok(DeviceMemory {
            address,
            context: Arc::clone(self.context),
        })
    }

    /// Host memory that the device reaches by itself, not initialised.
    pub(super) fn allocate_host(&self, bytes: usize) -> Result<PinnedMemory, Error> {
        // SAFETY: a place of the right type.
        let address = given("cuMemHostAlloc", |a| unsafe {
            sys::cuMemHostAlloc(a, bytes, 0)
        })?;
        Ok(PinnedMemory {
            address: address.cast(),
            bytes,
            context: Arc::clone(self.context),
        })
    }

    /// Writes into memory of the device, and waits until it is there.
    pub(super) fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        // SAFETY: the driver refuses what is no memory of the device.
        check("cuMemcpyHtoD", unsafe {
            sys::cuMemcpyHtoD_v2(to, bytes.as_ptr().cast(), bytes.len())
        })?;
        // From pageable memory it may return before the device has it all.
        // SAFETY: a context is current.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }

    /// Reads memory of the device.
    pub(super) fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the driver refuses what is no memory of the device; the place is ours.
        check("cuMemcpyDtoH", unsafe {
            sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), from, bytes.len())
        })
    }

    /// Compiles PTX for this device and finds a function in it.
    pub(super) fn function(&self, ptx: &CStr, name: &CStr) -> Result<Function, Error> {
        // SAFETY: both are strings that end, and the places have the right types.
        unsafe {
            let module = given("cuModuleLoadData", |m| {
                sys::cuModuleLoadData(m, ptx.as_ptr().cast())
            })?;
            let mut function = Function {
                module,
                raw: ptr::null_mut(),
                context: Arc::clone(self.context),
            };
            function.raw = given("cuModuleGetFunction", |f| {
                sys::cuModuleGetFunction(f, module, name.as_ptr())
            })?;
            Ok(function)
        }
    }

    /// Asks for pieces to be copied, each (to, from, bytes).
    ///
    /// # Safety
    /// All are memory of this device or of this process, of that length, until the stream has done it; no two destinations
    /// overlap.
    pub(super) unsafe fn copy_many(&self, lists: &Pieces, stream: &Stream) -> Result<(), Error> {
        let Some(call) = self.context.batch.filter(|_| lists.to.len() > 1) else {
            for ((to, from), bytes) in lists.to.iter().zip(&lists.from).zip(&lists.bytes) {
                // SAFETY: the caller's promise.
                check("cuMemcpyAsync", unsafe {
                    sys::cuMemcpyAsync(*to, *from, *bytes, stream.raw)
                })?;
            }
            return Ok(());
        };
        let attributes = CopyAttributes {
            order: ORDER_STREAM,
            hints: [0; 4],
            flags: 0,
        };
        for at in (0..lists.to.len()).step_by(BATCH) {
            let count = BATCH.min(lists.to.len() - at);
            let (first, mut failed) = (0, usize::MAX);
            // SAFETY: the caller's promise; the lists are of one length, and the attributes are for all from the first on.
            check("cuMemcpyBatchAsync", unsafe {
                call(
                    lists.to[at..].as_ptr(),
                    lists.from[at..].as_ptr(),
                    lists.bytes[at..].as_ptr(),
                    count,
                    &attributes,
                    &first,
                    1,
                    &mut failed,
                    stream.raw,
                )
            })?;
        }
        Ok(())
    }
}

/// Pieces to be copied.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    to: Vec<u64>,
    from: Vec<u64>,
    bytes: Vec<usize>,
}

impl Pieces {
    pub(super) fn push(&mut self, to: u64, from: u64, bytes: usize) {
        self.to.push(to);
        self.from.push(from);
        self.bytes.push(bytes);
    }

    pub(super) fn clear(&mut self) {
        self.to.clear();
        self.from.clear();
        self.bytes.clear();
    }
}

/// A queue of the device. Only for who has entered its context.
#[derive(Debug)]
pub(super) struct Stream {
    raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Stream {}

impl Stream {
    /// Waits until all that was asked for is done.
    pub(super) fn synchronize(&self) -> Result<(), Error> {
        // SAFETY: a live stream.
        check("cuStreamSynchronize", unsafe {
            sys::cuStreamSynchronize(self.raw)
        })
    }

    /// What is asked for from now on begins after the event.
    pub(super) fn wait_for(&self, event: &Event) -> Result<(), Error> {
        // SAFETY: a live stream and a live event.
        check("cuStreamWaitEvent", unsafe {
            sys::cuStreamWaitEvent(self.raw, event.raw, 0)
        })
    }

    /// Asks for zeros.
    ///
    /// # Safety
    /// `memory` has so many bytes, and is there until the stream has done it.
    pub(super) unsafe fn zero(&self, memory: &DeviceMemory, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(memory.address, 0, bytes, self.raw)
        })
    }

    /// Asks for rows to be copied.
    ///
    /// # Safety
    /// As [`Entered::copy_many`], for what the descriptor names.
    pub(super) unsafe fn copy_rows(&self, rows: &sys::CUDA_MEMCPY2D) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        check("cuMemcpy2DAsync", unsafe {
            sys::cuMemcpy2DAsync_v2(rows, self.raw)
        })
    }

    /// Asks for a kernel.
    ///
    /// # Safety
    /// The arguments are the function's, in number and types, and what they point to is there until the stream has done it.
    pub(super) unsafe fn launch(
        &self,
        function: &Function,
        blocks: u32,
        threads: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        check("cuLaunchKernel", unsafe {
            sys::cuLaunchKernel(
                function.raw,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                self.raw,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: nobody has it any more; the driver lets what was asked for come to its end.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// A point in a stream.
#[derive(Debug)]
pub(super) struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Puts it behind all that was asked of the stream up to now.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: a live stream of the same context.
        unsafe { self.record_raw(stream.raw) }
    }

    /// As [`Event::record`].
    ///
    /// # Safety
    /// `stream` is a live stream of this context, or null for the default one.
    pub(super) unsafe fn record_raw(&self, stream: sys::CUstream) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(self.raw, stream)
        })
    }

    /// Enters its context.
    pub(super) fn enter(&self) -> Result<Entered<'_>, Error> {
        self.context.enter()
    }

    /// Sleeps until it has passed.
    pub(super) fn synchronize(&self) -> Result<(), Error> {
        // SAFETY: a live event.
        check("cuEventSynchronize", unsafe {
            sys::cuEventSynchronize(self.raw)
        })
    }
}

impl Event {
    /// As [`Event::synchronize`], for one that will have passed soon: looks some times before it sleeps, because waking up takes
    /// longer than a small copy.
    pub(super) fn synchronize_soon(&self) -> Result<(), Error> {
        for _ in 0..LOOKS {
            // SAFETY: a live event.
            match unsafe { sys::cuEventQuery(self.raw) } {
                sys::CUresult::CUDA_ERROR_NOT_READY => std::hint::spin_loop(),
                code => return check("cuEventQuery", code),
            }
        }
        self.synchronize()
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: nobody has it any more.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

/// Memory of the device.
#[derive(Debug)]
pub(super) struct DeviceMemory {
    pub(super) address: u64,
    context: Arc<Context>,
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: who drops it has waited for what used it.
        let _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// Memory of this process that the driver knows of.
#[derive(Debug)]
pub(super) struct HostRange {
    address: usize,
    context: Arc<Context>,
}

impl Drop for HostRange {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: the driver refuses what is not registered.
        let _ = unsafe { sys::cuMemHostUnregister(self.address as *mut c_void) };
    }
}

/// Memory of the host that the driver gave.
#[derive(Debug)]
pub(super) struct PinnedMemory {
    pub(super) address: *mut u8,
    pub(super) bytes: usize,
    context: Arc<Context>,
}

// SAFETY: memory belongs to no thread.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// Writes a list, `at` bytes from the start.
    pub(super) fn write<T: Copy>(&mut self, at: usize, list: &[T]) {
        assert!(at + size_of_val(list) <= self.bytes);
        // SAFETY: inside the memory, as just checked; it is nobody else's while a batch is prepared.
        unsafe {
            let to = self.address.add(at);
            to.copy_from_nonoverlapping(list.as_ptr().cast(), size_of_val(list));
        }
    }

    /// The first words.
    pub(super) fn words(&self, count: usize) -> Vec<u64> {
        assert!(count * 8 <= self.bytes);
        // SAFETY: inside the memory, aligned as pages are, written by `write` or the device, which has ended.
        unsafe { std::slice::from_raw_parts(self.address.cast(), count) }.to_vec()
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: who drops it has waited for what used it.
        let _ = unsafe { sys::cuMemFreeHost(self.address.cast()) };
    }
}

/// A kernel.
#[derive(Debug)]
pub(super) struct Function {
    module: sys::CUmodule,
    raw: sys::CUfunction,
    context: Arc<Context>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Drop for Function {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: nobody launches it any more.
        let _ = unsafe { sys::cuModuleUnload(self.module) };
    }
}
