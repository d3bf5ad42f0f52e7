//! The fuzz target's work on a corpus of hostile frames, on stable: what a fuzzer has found once stays found.

#[path = "../fuzz/entry.rs"]
mod entry;

use std::path::Path;

#[test]
fn the_corpus_is_read_without_harm() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/hostile");
    let mut count = 0;
    for file in std::fs::read_dir(corpus).expect("the corpus is there") {
        let data = std::fs::read(file.expect("a file").path()).expect("can be read");
        entry::frames(&data);
        // And in pieces of other sizes, and cut off.
        for size in [0, 1, 2, 7, 63, 255] {
            let mut other = data.clone();
            if let Some(first) = other.first_mut() {
                *first = size;
            }
            entry::frames(&other);
        }
        for cut in 0..data.len().min(200) {
            entry::frames(&data[..cut]);
        }
        count += 1;
    }
    assert!(count >= 20, "only {count} files in the corpus");
}
