// Blocks between an engine's pages and a staging buffer, and their checksums on the way. Compiled to kernel.ptx by `make ptx`.
//
// One warp takes one item: one head of some layers of one block, `layers * head_words` words of 8 bytes, taken in the order in
// which the block stores them. Word i is with the lane that is (n - 1 - i) % 32 lanes from the last. Each lane goes
// through its words by Horner's rule, s = s * x^(64 * 32) + word, so that reads and writes of a warp are neighbours and no lane
// waits for another; at the end every lane's s is moved by its distance from the end and all are added. Words, sums and products
// are polynomials over GF(2) modulo that of CRC-64/NVME, lowest bit first; `crc.rs` has the arithmetic and says the same in
// Rust.

typedef unsigned long long u64;
typedef unsigned int u32;

#define NOWHERE 0xffffffffu
#define POLYNOMIAL 0x9a6c9329ac4bc9b5ull
#define ONE 0x8000000000000000ull
#define AHEAD 8

// As `Item` in batch.rs.
struct Item {
    u64 staged;
    u64 staged_step;
    u64 after;
    u32 layers;
    u32 layer;
    u32 head;
    u32 page;
    u32 crc;
    u32 begins;
};

// As `Layer` in batch.rs.
struct Layer {
    u64 base;
    u64 block_stride;
    u64 head_stride;
    u64 token_stride;
};

static_assert(sizeof(Item) == 48 && sizeof(Layer) == 32, "as in batch.rs");

__device__ static u64 multiply(u64 a, u64 b) {
    u64 product = 0;
    for (int bit = 63; bit >= 0; bit--) {
        product ^= (b >> bit & 1) ? a : 0;
        a = (a >> 1) ^ ((a & 1) ? POLYNOMIAL : 0);
    }
    return product;
}

// Where a lane is: in the engine's pages, and in the staging buffer.
struct Place {
    const Layer *layers;
    const u32 *pages;
    u32 page_tokens, pages_per_block, cell_words, head_words;
    u32 head;
    // The engine's side: layer, page of the block, token of the page, word of the cell, and the address of the page's head.
    const Layer *layer;
    u32 page, token, word;
    u64 address;
    // The staging side: word in the row, and the address of the row.
    u32 at;
    u64 row, row_step;
    // Whether there is an engine's side, and whether `address` is to be looked up anew.
    bool copies, stale;

    __device__ void look() {
        if (copies) {
            address = layer->base + (u64)pages[page] * layer->block_stride + (u64)head * layer->head_stride;
        }
    }

    __device__ void start(u32 i) {
        u32 number = i / head_words;
        at = i % head_words;
        row += number * row_step;
        layer += number;
        word = at % cell_words;
        token = at / cell_words % page_tokens;
        page = at / cell_words / page_tokens;
        look();
    }

    __device__ u64 *engine() const {
        return (u64 *)(address + token * layer->token_stride) + word;
    }

    __device__ u64 *staged() const {
        return (u64 *)row + at;
    }

    // 32 words on. The page is looked up only when it is used, so never beyond the item.
    __device__ void next() {
        at += 32;
        while (at >= head_words) {
            at -= head_words;
            row += row_step;
        }
        word += 32;
        while (word >= cell_words) {
            word -= cell_words;
            if (++token == page_tokens) {
                token = 0;
                stale = true;
                if (++page == pages_per_block) {
                    page = 0;
                    layer++;
                }
            }
        }
    }

    __device__ void fresh() {
        if (stale) {
            stale = false;
            look();
        }
    }
};

// `sums` has one place for each item, in memory of the host. `tables`: for each byte of a word its 256 products with x^(64 * 32), then 32 factors, one for each lane.
extern "C" __global__ void __launch_bounds__(256) kvd_copy(const Item *items, u32 count, const Layer *layers, const u32 *pages,
                                                           u64 *sums, const u64 *tables, u64 staging, u32 page_tokens,
                                                           u32 pages_per_block, u32 cell_words, u32 store) {
    __shared__ u64 fold[8][256];
    for (u32 i = threadIdx.x; i < 8 * 256; i += blockDim.x) {
        fold[i / 256][i % 256] = tables[i];
    }
    __syncthreads();
    u32 lane = threadIdx.x % 32;
    u64 factor = tables[8 * 256 + lane];
    u32 warps = gridDim.x * (blockDim.x / 32);
    for (u32 number = (blockIdx.x * blockDim.x + threadIdx.x) / 32; number < count; number += warps) {
        Item item = items[number];
        Place place;
        place.page_tokens = page_tokens;
        place.pages_per_block = pages_per_block;
        place.cell_words = cell_words;
        place.head_words = page_tokens * pages_per_block * cell_words;
        place.head = item.head;
        place.pages = pages + item.page;
        place.copies = item.layer != NOWHERE;
        place.layer = layers + (place.copies ? item.layer : 0);
        place.row = staging + item.staged;
        place.row_step = item.staged_step;
        place.stale = false;
        place.address = 0;
        u32 n = item.layers * place.head_words;
        u32 missing = (32 - n % 32) % 32;
        // Lanes that have no word in the first turn begin with the second.
        u32 i = lane < missing ? lane + 32 - missing : lane - missing;
        u64 sum = 0;
        if (i < n) {
            place.start(i);
        }
        while (i < n) {
            u64 words[AHEAD];
            u64 *to[AHEAD];
            u32 got = 0;
#pragma unroll
            for (u32 k = 0; k < AHEAD; k++) {
                if (i + 32 * k < n) {
                    place.fresh();
                    u64 *staged = place.staged(), *engine = place.copies ? place.engine() : 0;
                    words[k] = *(volatile u64 *)(store ? engine : staged);
                    to[k] = store ? staged : engine;
                    got = k + 1;
                    place.next();
                }
            }
#pragma unroll
            for (u32 k = 0; k < AHEAD; k++) {
                if (k < got) {
                    if (to[k]) {
                        *to[k] = words[k];
                    }
                    u64 word = words[k] ^ (item.begins && i + 32 * k == 0 ? ~0ull : 0);
                    u64 folded = 0;
#pragma unroll
                    for (u32 byte = 0; byte < 8; byte++) {
                        folded ^= fold[byte][sum >> 8 * byte & 255];
                    }
                    sum = folded ^ word;
                }
            }
            i += 32 * AHEAD;
        }
        sum = multiply(sum, factor);
        for (u32 other = 16; other; other /= 2) {
            sum ^= __shfl_xor_sync(0xffffffffu, sum, other);
        }
        if (lane == 0) {
            sums[number] = item.after == ONE ? sum : multiply(sum, item.after);
        }
    }
}
