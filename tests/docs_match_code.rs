//! Does the documentation say what the code does? Generated parts are compared with what the code
//! generates; `cargo xtask bless` rewrites them.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use burn_prism::plan::support_table;

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

/// Every row that this build can generate; rows of devices that it leaves out stay as they are.
#[test]
fn bless_support_table_of_the_readme() {
    const BEGIN: &str = "<!-- support table: generated from plan() -->\n";
    const END: &str = "<!-- end of support table -->";
    let readme = read("README.md");
    let begin = readme.find(BEGIN).expect("the README marks the table") + BEGIN.len();
    let end = readme.find(END).expect("the README marks the end of the table");
    let generated = support_table(&tabled());
    let name = |row: &str| row.split('|').nth(1).unwrap_or_default().to_string();
    let mut rows: Vec<&str> = readme[begin..end].lines().collect();
    for row in generated.lines() {
        match rows.iter_mut().find(|old| name(old) == name(row)) {
            Some(old) => *old = row,
            None => rows.push(row),
        }
    }
    let table: String = rows.iter().flat_map(|row| [*row, "\n"]).collect();
    if std::env::var_os("PRISM_BLESS").is_some() {
        let text = format!("{}{table}{}", &readme[..begin], &readme[end..]);
        std::fs::write(root().join("README.md"), text).unwrap();
        return;
    }
    assert_eq!(&readme[begin..end], table, "run `cargo xtask bless`");
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
