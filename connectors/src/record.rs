//! The namespace record of this engine instance: what the engine's configuration says (given by the shim), what its workers
//! say ([`Fleet`]), the adapter and the weights epoch, put together in the one canonical encoding.

use kvd_core::record::{NamespaceRecord, RecordError};

use crate::fleet::Fleet;

/// Fields that the shim found out: names as in the record, values as text.
pub type Fields = Vec<(String, String)>;

/// Builds the canonical record.
///
/// `facts` has what concerns the whole instance: `tenant`, `model`, `weights`, `kv_dtype`, `hash` and the optional ones.
/// `adapter` is the content digest of a LoRA; `epoch` is set once weights were replaced in place.
///
/// # Errors
/// When a required field is missing, or a value is not what its field needs.
pub fn build(
    facts: &Fields,
    fleet: &Fleet,
    adapter: Option<&str>,
    epoch: Option<&str>,
) -> Result<Vec<u8>, RecordError> {
    let mut fields = facts.clone();
    let mut add = |name: &str, value: String| fields.push((name.to_owned(), value));
    add("cell_encoding", fleet.encoding.clone());
    if !fleet.scales.is_empty() {
        add("scales", fleet.scales.clone());
    }
    if let Some(adapter) = adapter {
        add("adapter", adapter.to_owned());
    }
    if let Some(epoch) = epoch {
        add("weights_epoch", epoch.to_owned());
    }
    add("groups", fleet.groups.len().to_string());
    let block_tokens = fleet.groups.first().map_or(0, |group| group.rule.span());
    add("block_tokens", block_tokens.to_string());
    for group in &fleet.groups {
        let geometry = &group.geometry;
        let mut add =
            |name: &str, value: String| add(&format!("group.{}.{name}", group.group), value);
        add("kind", geometry.kind.word().to_owned());
        add("layers", geometry.layers.to_string());
        add("heads", geometry.heads.to_string());
        add("cell_bytes", geometry.cell_bytes.to_string());
        if let Some(window) = geometry.window {
            add("window", window.to_string());
        }
        if group.rule.span() != block_tokens {
            add("block_tokens", group.rule.span().to_string());
        }
        add("layer_names", names(&group.layer_names));
    }
    Ok(NamespaceRecord::build(fields)?.encode())
}

/// Layer names in short: their number is in the record already, so a digest says whether they are the same.
fn names(names: &[String]) -> String {
    let mut hash = blake3::Hasher::new();
    for name in names {
        hash.update(&(name.len() as u32).to_le_bytes());
        hash.update(name.as_bytes());
    }
    format!("blake3:{}", hash.finalize().to_hex())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{assemble, tests::hello};

    fn facts() -> Fields {
        [
            ("tenant", "default"),
            ("model", "m"),
            ("weights", "blake3:00"),
            ("kv_dtype", "bfloat16"),
            ("hash", "sha256_cbor:1f2e"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    #[test]
    fn parallel_degree_is_not_in_the_record() {
        let one = assemble(&[hello(0, 1, 0, 0, 4, (0, 2, 2))]).unwrap();
        let two = assemble(&[
            hello(0, 2, 0, 0, 4, (0, 1, 2)),
            hello(1, 2, 0, 0, 4, (1, 1, 2)),
        ])
        .unwrap();
        let piped = assemble(&[
            hello(0, 2, 0, 0, 1, (0, 2, 2)),
            hello(1, 2, 1, 1, 3, (0, 2, 2)),
        ])
        .unwrap();
        let record = build(&facts(), &one, None, None).unwrap();
        assert_eq!(record, build(&facts(), &two, None, None).unwrap());
        assert_eq!(record, build(&facts(), &piped, None, None).unwrap());
        assert_ne!(
            record,
            build(&facts(), &one, Some("blake3:11"), None).unwrap()
        );
        assert_ne!(record, build(&facts(), &one, None, Some("ab:1")).unwrap());
    }

    #[test]
    fn missing_facts_are_named() {
        let one = assemble(&[hello(0, 1, 0, 0, 4, (0, 2, 2))]).unwrap();
        let error = build(&Fields::new(), &one, None, None).unwrap_err();
        assert!(error.to_string().contains("lacks"), "{error}");
    }
}
