//! Paths that are not regular files.

use std::path::Path;

use prism_models::gguf::GgufFile;
use prism_models::safetensors_file::SafetensorsFile;
use prism_models::{Checkpoint, LoadError};

/// Opens a path in every way there is, and hands each error to `check`.
fn refused(path: &Path, check: impl Fn(&LoadError) -> bool) {
    let errors = [
        GgufFile::open(path).unwrap_err(),
        SafetensorsFile::open(path).unwrap_err(),
        Checkpoint::open(path).unwrap_err(),
    ];
    for error in errors {
        assert!(check(&error), "{error}");
    }
}

#[test]
fn is_a_missing_file_refused() {
    let directory = tempfile::tempdir().unwrap();
    refused(&directory.path().join("absent"), |error| matches!(error, LoadError::Io { .. }));
}

#[test]
fn is_a_directory_refused() {
    let directory = tempfile::tempdir().unwrap();
    refused(directory.path(), |error| {
        // The checkpoint looks inside for weights.
        matches!(
            error,
            LoadError::NotRegularFile { kind: "directory", .. } | LoadError::MissingFile { .. }
        )
    });
}

#[cfg(unix)]
#[test]
fn is_a_loop_of_links_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    std::os::unix::fs::symlink(&path, &path).unwrap();
    refused(&path, |error| matches!(error, LoadError::Io { .. }));
    let error = Checkpoint::open(directory.path()).unwrap_err();
    assert!(matches!(error, LoadError::Io { .. }));
}

#[cfg(unix)]
#[test]
fn is_a_fifo_refused_without_waiting_for_a_writer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let status = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(status.success());
    refused(&path, |error| matches!(error, LoadError::NotRegularFile { .. }));
    let error = Checkpoint::open(directory.path()).unwrap_err();
    assert!(matches!(error, LoadError::NotRegularFile { .. }));
}

#[cfg(unix)]
#[test]
fn is_a_forbidden_file_refused_unless_the_user_may_read_everything() {
    use std::os::unix::fs::PermissionsExt;

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    std::fs::write(&path, crate::support::Gguf::new().bytes()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    let readable = std::fs::File::open(&path).is_ok();
    match GgufFile::open(&path) {
        Ok(_) => assert!(readable),
        Err(error) => assert!(!readable && matches!(error, LoadError::Io { .. }), "{error}"),
    }
}

#[test]
fn are_an_empty_file_and_a_git_lfs_pointer_recognised() {
    let empty = crate::support::file("model.gguf", b"");
    refused(&empty.path, |error| matches!(error, LoadError::EmptyFile { .. }));
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    let pointer = crate::support::file("model.gguf", pointer);
    refused(&pointer.path, |error| matches!(error, LoadError::LfsPointer { .. }));
}
