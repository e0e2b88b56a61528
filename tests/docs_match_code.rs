//! Does the documentation say what the code does? Generated parts are compared with what the code
//! generates; `cargo xtask bless` rewrites them.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use burn_prism::plan::support_table;
use prism_models::config::architecture_table;
use prism_models::memory::memory_table;
use prism_models::shapes::shape;
use prism_models::{Memory, ModelConfig, presets};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Devices whose row of the support table is the same on every machine that has them.
fn tabled() -> Vec<(&'static str, Device)> {
    vec![
        ("`Device::flex()`", Device::flex()),
        ("`Device::ndarray()`", tests::ndarray()),
        #[cfg(feature = "cpu")]
        ("`Device::cpu()`", Device::cpu()),
    ]
}

/// The part of a page between two marks, and the page up to it and from its end on.
fn generated<'a>(page: &'a str, begin: &str, end: &str) -> [&'a str; 3] {
    let from = page.find(begin).expect("the page marks the table") + begin.len();
    let to = page.find(end).expect("the page marks the end of the table");
    [&page[..from], &page[from..to], &page[to..]]
}

/// Compares a page's generated part with what the code generates now, or rewrites it.
fn bless(path: &str, [before, old, after]: [&str; 3], new: &str) {
    if std::env::var_os("PRISM_BLESS").is_some() {
        std::fs::write(root().join(path), format!("{before}{new}{after}")).unwrap();
        return;
    }
    assert_eq!(old, new, "run `cargo xtask bless`");
}

/// Every row that this build can generate; rows of devices that it leaves out stay as they are.
#[test]
fn bless_support_table_of_the_readme() {
    let readme = read("README.md");
    let parts = generated(
        &readme,
        "<!-- support table: generated from plan() -->\n",
        "<!-- end of support table -->",
    );
    let table = support_table(&tabled());
    let name = |row: &str| row.split('|').nth(1).unwrap_or_default().to_string();
    let mut rows: Vec<&str> = parts[1].lines().collect();
    for row in table.lines() {
        match rows.iter_mut().find(|old| name(old) == name(row)) {
            Some(old) => *old = row,
            None => rows.push(row),
        }
    }
    let table: String = rows.iter().flat_map(|row| [*row, "\n"]).collect();
    bless("README.md", parts, &table);
}

#[test]
fn bless_published_masses_of_the_policies_page() {
    let page = read("docs/policies.md");
    let parts = generated(
        &page,
        "<!-- published masses: generated from presets::PUBLISHED -->\n",
        "<!-- end of published masses -->",
    );
    bless("docs/policies.md", parts, &presets::published_table());
}

#[test]
fn bless_architectures_of_the_models_page() {
    let page = read("docs/models.md");
    let parts = generated(
        &page,
        "<!-- architectures: generated from Architecture -->\n",
        "<!-- end of architectures -->",
    );
    bless("docs/models.md", parts, &architecture_table());
}

/// Models, and their parameters as published.
fn sized() -> [(&'static str, ModelConfig, u64); 4] {
    [
        ("Llama-3.1-8B", shape("llama-3.1-8b").unwrap(), 8_030_261_248),
        ("Llama-3.2-1B", shape("llama-3.2-1b").unwrap(), 1_235_814_400),
        ("Qwen3-8B", shape("qwen3-8b").unwrap(), 8_190_735_360),
        ("Qwen2.5-7B", shape("qwen2.5-7b").unwrap(), 7_615_616_512),
    ]
}

#[test]
fn bless_memory_table_of_the_models_page() {
    let models = sized().map(|(name, config, _)| (name, config));
    let table = memory_table(&models, &[8192, 32768, 131_072]).unwrap();
    let page = read("docs/models.md");
    let parts = generated(
        &page,
        "<!-- memory table: generated from Memory -->\n",
        "<!-- end of memory table -->",
    );
    bless("docs/models.md", parts, &table);
}

/// What the table is made from, against numbers from elsewhere.
#[test]
fn memory_is_what_models_are_known_to_take() {
    for (name, config, parameters) in sized() {
        let memory = Memory::of(&config, 131_072, 128, 2).unwrap();
        assert_eq!(memory.weights, 2 * parameters, "{name}");
    }
    let [(_, llama, _), ..] = sized();
    let memory = Memory::of(&llama, 131_072, 128, 2).unwrap();
    // 128 KiB a token; a mean of 4 bytes for 128 keys of 2 is 1/64 of the keys.
    assert_eq!(memory.kv_cache, 16 << 30);
    assert_eq!(memory.pooled_keys, memory.kv_cache / 2 / 64);
    assert_eq!(memory.pooled_queries, 32 * 1024 * 128 * 4);
    assert_eq!(memory.selection, 32 * 1024 * (1024 / 8 + 4));
}

/// The annotated tree of the README names every crate and top-level folder that exists.
#[test]
fn tree_of_the_readme_is_complete() {
    let readme = read("README.md");
    for folder in ["crates", "."] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.path().is_dir() && !name.starts_with('.') && name != "target" {
                assert!(readme.contains(&name), "README.md doesn't mention {folder}/{name}");
            }
        }
    }
}

/// The 15-line patch of the README stands in the example, line for line.
#[test]
fn patch_of_the_readme_is_the_examples() {
    let (readme, example) = (read("README.md"), read("examples/patch_your_llama.rs"));
    let diff = readme.split("```diff\n").nth(1).and_then(|rest| rest.split("```").next());
    let diff = diff.expect("the README shows the patch as a diff");
    let mut changed = 0;
    for line in diff.lines() {
        let Some(code) = line.strip_prefix(['+', '-']) else {
            continue;
        };
        changed += 1;
        assert!(example.contains(code.trim()), "not in the example: {code}");
    }
    assert!((5..15).contains(&changed), "{changed} lines change");
}
