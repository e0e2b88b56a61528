//! A hub of one model on the loopback: what its client asks of the real one, answered as that does.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A file as the hub has it.
pub struct Held {
    /// Bytes that the listing says.
    pub size: usize,
    /// How a question for its headers is answered.
    pub head: &'static str,
    /// How a question for its content is answered, and with what.
    pub get: (&'static str, Vec<u8>),
}

impl Held {
    /// A file without a flaw.
    pub fn sound(content: Vec<u8>) -> Self {
        Self { size: content.len(), head: OK, get: (OK, content) }
    }
}

pub const OK: &str = "200 OK";
pub const MISSING: &str = "404 Not Found";

pub struct Hub {
    /// As `HF_ENDPOINT` takes it.
    pub endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    /// Serves the model `id` until the tests end.
    pub fn serve(id: &'static str, files: BTreeMap<String, Held>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (files, heard, own) = (Arc::new(files), asked.clone(), endpoint.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, heard, own) = (files.clone(), heard.clone(), own.clone());
                std::thread::spawn(move || converse(stream, id, &files, &heard, &own));
            }
        });
        Self { endpoint, asked }
    }

    /// The files whose contents were asked for since the last call, in order of their names.
    pub fn handed_out(&self) -> Vec<String> {
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        let content = |line: &String| Some(line.strip_prefix("GET /cdn/")?.to_string());
        let mut files: Vec<_> = asked.iter().filter_map(content).collect();
        files.sort();
        files
    }
}

/// Answers one question after another until the client hangs up.
fn converse(
    mut stream: TcpStream,
    id: &str,
    files: &BTreeMap<String, Held>,
    heard: &Mutex<Vec<String>>,
    own: &str,
) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    while let Some(Ok(question)) = lines.next() {
        // The headers change nothing here, and no question has a body.
        while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
        let mut words = question.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let path = path.split('?').next().unwrap();
        heard.lock().unwrap().push(format!("{method} {path}"));
        let (status, headers, body) = answer(method, path, id, files, own);
        let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n", body.len());
        let body: &[u8] = if method == "HEAD" { &[] } else { &body };
        if stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).is_err() {
            return;
        }
    }
}

/// Status, headers and body.
fn answer(
    method: &str,
    path: &str,
    id: &str,
    files: &BTreeMap<String, Held>,
    own: &str,
) -> (&'static str, String, Vec<u8>) {
    let json = |value: serde_json::Value| (OK, String::new(), value.to_string().into_bytes());
    let missing = (MISSING, "X-Error-Message: Repository not found\r\n".to_string(), Vec::new());
    if let Some(question) = path.strip_prefix(&format!("/api/models/{id}/")) {
        return match question.split('/').collect::<Vec<_>>()[..] {
            ["revision", "main"] => json(serde_json::json!({ "id": id, "sha": COMMIT })),
            ["tree", "main" | COMMIT] => {
                let entry = |(path, file): (&String, &Held)| {
                    let size = file.size;
                    serde_json::json!({ "type": "file", "oid": "0", "size": size, "path": path })
                };
                json(files.iter().map(entry).collect())
            }
            _ => missing,
        };
    }
    let file = |path: &str, prefix: &str| {
        let name = path.strip_prefix(prefix)?;
        Some((name.to_string(), files.get(name)?))
    };
    if let Some((name, file)) = file(path, &format!("/{id}/resolve/{COMMIT}/")) {
        let commit = format!("X-Repo-Commit: {COMMIT}\r\nETag: \"{name}-etag\"\r\n");
        if file.head != OK {
            return (file.head, commit, Vec::new());
        }
        // Weights lie elsewhere, and the way there is asked for by either method.
        let elsewhere =
            format!("{commit}X-Linked-Size: {}\r\nLocation: {own}/cdn/{name}\r\n", file.size);
        return ("302 Found", elsewhere, Vec::new());
    }
    match file(path, "/cdn/") {
        Some((_, file)) if method == "GET" => (file.get.0, String::new(), file.get.1.clone()),
        _ => missing,
    }
}
