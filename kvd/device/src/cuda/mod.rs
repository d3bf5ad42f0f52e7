//! The adapter for NVIDIA GPUs: the driver's side of [`crate::gpu`].
//!
//! A call takes a lane: two streams with half a staging buffer each, so that one half's transfer runs beside the other half's
//! kernel. All lanes are made at the start, and calls wait for one: a GPU that serves has no memory to spare. The kernel comes as
//! PTX, which the driver compiles.
//!
//! What was measured on an H200 stands behind the form (`docs/benchmarks.md`): pieces of a page are too small to be copied
//! one by one (8 KiB: a fourteenth of the link by plain calls, at best 0.4 of it batched), pieces of 64 KiB reach the link in
//! batches, and a piece that lies in two registrations is refused.

mod driver;
mod memory;

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use cudarc::driver::sys;
use kvd_arena::Registered;
use parking_lot::{Condvar, Mutex};

use crate::gpu::batch::{Batch, Chunk, Item, Layer, Transfer, Way};
use crate::gpu::{Backend, crc};
use crate::{Error, Passed, Point, StreamHandle};
pub use memory::{CudaMemory, EngineWork, Link};

use driver::{Context, DeviceMemory, Entered, Event, Function, Pieces, PinnedMemory, Stream};

/// Calls at the same time: what an engine's worker has threads for. Each lane has 16 MiB of the GPU, and a little for lists.
const LANES: usize = 4;
/// Bytes of half a staging buffer.
const HALF_BYTES: usize = 8 << 20;
/// Blocks of the kernel: enough to be well ahead of the link, and few beside the engine's own.
const BLOCKS_MAX: u32 = 64;
/// When so many chunks are left, a call that slept wakes up, to see their end at once: about as long as waking up takes.
const LAST_CHUNKS: usize = 3;
/// Bytes of a lane's lists, or more when a call needs them.
const LIST_BYTES: usize = 1 << 20;
// The kernel has the same.
const _: () = assert!(size_of::<Item>() == 48 && size_of::<Layer>() == 32);

/// Threads of a block; the kernel is compiled for no more.
const THREADS: u32 = 256;
const WARPS: u32 = THREADS / 32;

const KERNEL: &str = concat!(include_str!("kernel.ptx"), "\0");

/// Engine memory on an NVIDIA GPU.
#[derive(Debug)]
pub struct CudaDevice {
    /// Those that no call has.
    lanes: Mutex<Vec<Lane>>,
    free: Condvar,
    tables: DeviceMemory,
    kernel: Function,
    context: Arc<Context>,
}

impl CudaDevice {
    /// The GPU with this number, as this process sees GPUs.
    ///
    /// # Errors
    /// `Failed` when there is no driver, no such GPU, or one that is too old.
    pub fn open(ordinal: u32) -> Result<Self, Error> {
        let context = Arc::new(Context::open(ordinal)?);
        let entered = context.enter()?;
        let ptx = CStr::from_bytes_with_nul(KERNEL.as_bytes())
            .map_err(|e| Error::Failed(format!("the kernel is no text: {e}")))?;
        let kernel = entered.function(ptx, c"kvd_copy")?;
        let mut words = crc::products(crc::shift(32));
        words.extend((0..32).map(|lane| crc::shift(32 - lane)));
        let tables = entered.allocate(words.len() * 8)?;
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        entered.upload(tables.address, &bytes)?;
        let lanes = (0..LANES)
            .map(|_| Lane::new(&entered))
            .collect::<Result<_, _>>()?;
        drop(entered);
        Ok(Self {
            lanes: Mutex::new(lanes),
            free: Condvar::new(),
            tables,
            kernel,
            context,
        })
    }

    /// Takes a lane; waits for one.
    fn call(&self) -> Call<'_> {
        let mut lanes = self.lanes.lock();
        loop {
            if let Some(lane) = lanes.pop() {
                return Call {
                    lane: Some(lane),
                    cuda: self,
                    over: false,
                };
            }
            self.free.wait(&mut lanes);
        }
    }

    /// Asks for everything, in the order in which each half's stream must do it.
    ///
    /// # Safety
    /// What the batch names is there until both streams have done it.
    unsafe fn ask(
        &self,
        entered: &Entered<'_>,
        lane: &mut Lane,
        way: Way,
        batch: &Batch,
    ) -> Result<(), Error> {
        let lists = lane.upload(entered, batch)?;
        let [first, second] = &lane.halves;
        lane.pieces.clear();
        lane.pieces.push(lists.device, lists.pinned, lists.bytes);
        // SAFETY: the lists are as long as was just written, on both sides.
        unsafe { entered.copy_many(&lane.pieces, &first.stream)? };
        first.end.record(&first.stream)?;
        second.stream.wait_for(&first.end)?;
        let halves = lane.halves.iter().cycle();
        for ((number, chunk), half) in batch.chunks.iter().enumerate().zip(halves) {
            let transfers = &batch.transfers[chunk.transfers.clone()];
            // SAFETY: the caller's promise; the planner keeps within slots, pages and half a buffer.
            unsafe {
                if way == Way::Load {
                    half.transfer(entered, way, transfers, &mut lane.pieces)?;
                }
                self.kernel(half, way, chunk, &lists)?;
                if way == Way::Store {
                    half.transfer(entered, way, transfers, &mut lane.pieces)?;
                }
            }
            if number + LAST_CHUNKS == batch.chunks.len() {
                lane.nearly.record(&half.stream)?;
            }
        }
        first.end.record(&first.stream)?;
        second.end.record(&second.stream)
    }

    /// # Safety
    /// As [`CudaDevice::ask`].
    unsafe fn kernel(
        &self,
        half: &Half,
        way: Way,
        chunk: &Chunk,
        lists: &Lists,
    ) -> Result<(), Error> {
        let mut count = chunk.items.len() as u32;
        let mut items = lists.items + (chunk.items.start * size_of::<Item>()) as u64;
        let mut sums = lists.sums + (chunk.items.start * 8) as u64;
        let (mut layers, mut pages) = (lists.layers, lists.pages);
        let (mut tables, mut staging) = (self.tables.address, half.staging.address);
        let mut shape = chunk.shape;
        let mut store = u32::from(way == Way::Store);
        let mut arguments: [*mut c_void; 11] = [
            (&raw mut items).cast(),
            (&raw mut count).cast(),
            (&raw mut layers).cast(),
            (&raw mut pages).cast(),
            (&raw mut sums).cast(),
            (&raw mut tables).cast(),
            (&raw mut staging).cast(),
            (&raw mut shape.page_tokens).cast(),
            (&raw mut shape.pages_per_block).cast(),
            (&raw mut shape.cell_words).cast(),
            (&raw mut store).cast(),
        ];
        let blocks = count.div_ceil(WARPS).min(BLOCKS_MAX);
        // SAFETY: the kernel's arguments in its order and of its types; the caller promises for what they point to.
        unsafe {
            half.stream
                .launch(&self.kernel, blocks, THREADS, &mut arguments)
        }
    }
}

impl Backend for CudaDevice {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn room(&self) -> usize {
        HALF_BYTES
    }

    fn run(&self, way: Way, batch: &Batch) -> Result<Vec<u64>, Error> {
        if batch.items.is_empty() {
            return Ok(Vec::new());
        }
        let entered = self.context.enter()?;
        let mut call = self.call();
        // SAFETY: jobs are borrowed until this returns, and `call` waits for both streams before it lets go of the lane, whatever
        // happened.
        unsafe { self.ask(&entered, call.lane(), way, batch)? };
        call.lane().wait(batch.chunks.len())?;
        let sums = call.lane().sums(batch.items.len());
        call.over = true;
        Ok(sums)
    }

    fn register(&self, address: usize, bytes: usize) -> Result<Option<Registered>, Error> {
        let told = self.context.enter()?.register(address, bytes)?;
        Ok(Some(Box::new(told)))
    }

    fn point(&self, stream: StreamHandle) -> Result<Point, Error> {
        let entered = self.context.enter()?;
        let event = entered.event()?;
        // SAFETY: who made the handle has promised that it is a stream of this device's primary context.
        unsafe { event.record_raw(stream.get() as sys::CUstream)? };
        Ok(Point::new(event))
    }
}

impl Passed for Event {
    fn wait(&self) -> Result<(), Error> {
        let _entered = self.enter()?;
        self.synchronize()
    }
}

/// A call that has a lane.
struct Call<'a> {
    /// None once it is given back.
    lane: Option<Lane>,
    cuda: &'a CudaDevice,
    /// All that was asked for is done.
    over: bool,
}

impl Call<'_> {
    fn lane(&mut self) -> &mut Lane {
        self.lane.as_mut().expect("kept until the call is dropped")
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let Some(lane) = self.lane.take() else { return };
        if !self.over {
            // Something failed on the way; what was asked for before is waited for. An error here is one of the whole context, in
            // which nothing runs any more.
            let _entered = self.cuda.context.enter();
            for half in &lane.halves {
                let _ = half.stream.synchronize();
            }
        }
        self.cuda.lanes.lock().push(lane);
        self.cuda.free.notify_one();
    }
}

/// What a call needs for itself. Its users wait for both streams before they let go of it.
#[derive(Debug)]
struct Lane {
    halves: [Half; 2],
    /// Passed when few chunks are left.
    nearly: Event,
    /// The sums and the batch's lists on the host's side, and the lists on the device's.
    lists: (PinnedMemory, DeviceMemory),
    pieces: Pieces,
}

/// Half a staging buffer, and the stream of all that uses it.
#[derive(Debug)]
struct Half {
    stream: Stream,
    /// What it was asked for is done.
    end: Event,
    staging: DeviceMemory,
}

/// Addresses of the sums and of a batch's lists, which are `bytes` long from `pinned` and from `device`.
struct Lists {
    sums: u64,
    pinned: u64,
    device: u64,
    bytes: usize,
    items: u64,
    layers: u64,
    pages: u64,
}

/// Memory for lists of so many bytes, on the host's side and on the device's.
fn lists(entered: &Entered<'_>, bytes: usize) -> Result<(PinnedMemory, DeviceMemory), Error> {
    Ok((entered.allocate_host(bytes)?, entered.allocate(bytes)?))
}

impl Lane {
    fn new(entered: &Entered<'_>) -> Result<Self, Error> {
        let half = || {
            Ok(Half {
                stream: entered.stream()?,
                end: entered.event()?,
                staging: entered.allocate(HALF_BYTES)?,
            })
        };
        Ok(Self {
            halves: [half()?, half()?],
            nearly: entered.event()?,
            lists: lists(entered, LIST_BYTES)?,
            pieces: Pieces::default(),
        })
    }

    /// Writes the lists where the device can fetch them.
    fn upload(&mut self, entered: &Entered<'_>, batch: &Batch) -> Result<Lists, Error> {
        let sums = batch.items.len() * 8;
        let layers = size_of_val(&batch.items[..]);
        let pages = layers + size_of_val(&batch.layers[..]);
        let bytes = pages + size_of_val(&batch.pages[..]);
        if self.lists.0.bytes < sums + bytes {
            self.lists = lists(entered, (sums + bytes).next_power_of_two())?;
        }
        let (pinned, device) = &mut self.lists;
        pinned.write(sums, &batch.items);
        pinned.write(sums + layers, &batch.layers);
        pinned.write(sums + pages, &batch.pages);
        Ok(Lists {
            sums: pinned.address as u64,
            pinned: pinned.address as u64 + sums as u64,
            device: device.address,
            bytes,
            items: device.address,
            layers: device.address + layers as u64,
            pages: device.address + pages as u64,
        })
    }

    /// Waits for all that was asked for.
    fn wait(&self, chunks: usize) -> Result<(), Error> {
        if chunks >= LAST_CHUNKS {
            self.nearly.synchronize()?;
        }
        self.halves
            .iter()
            .try_for_each(|half| half.end.synchronize_soon())
    }

    /// What the kernel has written for so many items.
    fn sums(&self, count: usize) -> Vec<u64> {
        self.lists.0.words(count)
    }
}

impl Half {
    /// Asks for the transfers of a chunk: whole ranges together, rows with gaps one by one.
    ///
    /// # Safety
    /// As [`CudaDevice::ask`].
    unsafe fn transfer(
        &self,
        entered: &Entered<'_>,
        way: Way,
        transfers: &[Transfer],
        pieces: &mut Pieces,
    ) -> Result<(), Error> {
        pieces.clear();
        for t in transfers {
            let (slot, staged) = (t.slot as u64, self.staging.address + t.staged as u64);
            if t.pitch == t.width || t.rows == 1 {
                match way {
                    Way::Store => pieces.push(slot, staged, t.width * t.rows),
                    Way::Load => pieces.push(staged, slot, t.width * t.rows),
                }
            } else {
                // SAFETY: the caller's promise.
                unsafe { self.stream.copy_rows(&rows(way, t, staged))? };
            }
        }
        // SAFETY: the caller's promise; chunks give each piece a place of its own.
        unsafe { entered.copy_many(pieces, &self.stream) }
    }
}

/// Rows with gaps between them in the slot, and without in the staging buffer.
fn rows(way: Way, t: &Transfer, staged: u64) -> sys::CUDA_MEMCPY2D {
    use sys::CUmemorytype::{CU_MEMORYTYPE_DEVICE, CU_MEMORYTYPE_HOST};
    let host = t.slot as *mut c_void;
    let mut copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: CU_MEMORYTYPE_HOST,
        srcHost: host,
        srcDevice: staged,
        srcArray: std::ptr::null_mut(),
        srcPitch: t.pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: CU_MEMORYTYPE_DEVICE,
        dstHost: host,
        dstDevice: staged,
        dstArray: std::ptr::null_mut(),
        dstPitch: t.width,
        WidthInBytes: t.width,
        Height: t.rows,
    };
    if way == Way::Store {
        std::mem::swap(&mut copy.srcMemoryType, &mut copy.dstMemoryType);
        std::mem::swap(&mut copy.srcPitch, &mut copy.dstPitch);
    }
    copy
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_compiled_kernel_is_of_this_source() {
        let engine = kvd_arena::checksum::Engine::Portable;
        let mut state = engine.start();
        engine.take(include_bytes!("kernel.cu"), &mut state);
        let line = format!(
            "// From kernel.cu, CRC-64/NVME {:016x}.\n",
            engine.finish(state)
        );
        assert!(super::KERNEL.starts_with(&line), "run make ptx");
    }
}
