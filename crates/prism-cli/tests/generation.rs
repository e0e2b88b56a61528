//! Do `prism run` and `prism chat` do what their arguments say? On a tiny model with random weights
//! whose tokens are single characters, so that an answer becomes the same tokens again.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// Begins and ends a message.
const SPECIAL: [&str; 2] = ["<|s|>", "<|e|>"];
const TEMPLATE: &str = "{% for m in messages %}<|s|>{{ m.content }}<|e|>{% endfor %}\
                        {% if add_generation_prompt %}<|s|>{% if tail is defined %}{{ tail }}\
                        {% endif %}{% endif %}";
/// As a template that leaves thoughts out of the history.
const FORGETFUL: &str = "{% for m in messages %}<|s|>{% if m.role == 'assistant' %}\
                         {{ m.content[:3] }}{% else %}{{ m.content }}{% endif %}<|e|>{% endfor %}\
                         {% if add_generation_prompt %}<|s|>{% endif %}";

fn character(id: u32) -> char {
    char::from_u32(0x4e00 + id).unwrap()
}

/// `n` tokens, others for other seeds.
fn text(seed: u32, n: u32) -> String {
    (0..n).map(|i| character((i * i * 7 + i * seed + seed) % 500 + 5)).collect()
}

/// A model in a folder that lives as long as this.
struct Model {
    folder: tempfile::TempDir,
}

impl Model {
    fn new(template: Option<&str>, generation: Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let tiny = root.join("fixtures/models/tiny-llama31");
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(tiny.join(file), folder.path().join(file)).unwrap();
        }
        let vocab: serde_json::Map<String, Value> =
            (0..510).map(|id| (character(id).to_string(), id.into())).collect();
        let added = SPECIAL.iter().zip(510..).map(|(content, id)| {
            json!({"id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        });
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let config = json!({"chat_template": template, "eos_token": SPECIAL[1]});
        let model = Self { folder };
        model.write("tokenizer.json", &tokenizer);
        model.write("tokenizer_config.json", &config);
        model.write("generation_config.json", &generation);
        model
    }

    fn write(&self, name: &str, json: &Value) {
        std::fs::write(self.folder.path().join(name), json.to_string()).unwrap();
    }

    fn prism(&self, command: &str, args: &[&str], input: &str) -> (bool, String, String) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_prism"))
            .args([command, "--model", self.folder.path().to_str().unwrap()])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A program that refuses its arguments reads nothing.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    }

    fn run(&self, args: &[&str]) -> Value {
        let (ok, out, error) = self.prism("run", &[args, &["--json"]].concat(), "");
        assert!(ok, "{args:?}: {error}");
        serde_json::from_str(&out).unwrap()
    }

    fn refused(&self, args: &[&str]) -> String {
        let (ok, _, error) = self.prism("run", args, "");
        assert!(!ok, "{args:?}");
        error
    }

    /// One JSON object a turn.
    fn chat(&self, args: &[&str], lines: &[&str]) -> Vec<Value> {
        let (ok, out, error) = self.prism("chat", &[args, &["--json"]].concat(), &lines.join("\n"));
        assert!(ok, "{args:?}: {error}");
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn string(value: &Value) -> &str {
    value.as_str().unwrap()
}

#[test]
fn do_chunks_give_the_text_of_the_whole_prompt() {
    let model = Model::new(Some(TEMPLATE), json!({}));
    let file = model.folder.path().join("prompt.txt");
    std::fs::write(&file, text(3, 100)).unwrap();
    let args = ["--prompt-file", file.to_str().unwrap(), "--max-tokens", "12"];
    let dense = [&args[..], &["--attention", "dense"]].concat();
    let whole = model.run(&dense);
    assert_eq!((&whole["prompt_tokens"], &whole["path"]), (&json!(103), &json!("dense")));
    assert_eq!((&whole["density"], &whole["density_by_head"]), (&json!(1.0), &Value::Null));
    for chunk in ["1", "7", "64", "1000"] {
        let chunked = model.run(&[&dense[..], &["--chunk", chunk]].concat());
        assert_eq!(chunked["text"], whole["text"], "chunks of {chunk}");
    }
    let old_name = model.run(&["--file", args[1], "--max-tokens", "12", "--attention", "dense"]);
    assert_eq!(old_name["text"], whole["text"]);
}

#[test]
fn are_times_rates_and_memory_numbers_that_belong_together() {
    let model = Model::new(Some(TEMPLATE), json!({}));
    let prompt = text(1, 60);
    let report = model.run(&["--prompt", &prompt, "--max-tokens", "5"]);
    let number = |name: &str| report[name].as_f64().unwrap_or_else(|| panic!("{name}: {report}"));
    let (prefill, first) = (number("prefill_seconds"), number("first_token_seconds"));
    assert!(0.0 < prefill && prefill <= first && first <= prefill + number("decode_seconds"));
    assert!((number("prefill_tokens_per_second") * prefill - 63.0).abs() < 1e-6);
    assert!(number("decode_tokens_per_second") > 0.0 && number("load_seconds") > 0.0);
    assert_eq!(report["ending"], "max_tokens");
    if cfg!(target_os = "linux") {
        assert!(report["peak_memory"]["host_bytes"].as_u64().unwrap() > 1 << 20);
    }
    // Flex has no allocator that says what it holds.
    assert_eq!(report["peak_memory"]["device_bytes"], Value::Null);
    let (ok, out, error) = model.prism("run", &["--prompt", &prompt, "--max-tokens", "5"], "");
    assert!(ok && out == format!("{}\n", string(&report["text"])), "{out:?}");
    for says in ["first token after", "tokens/s", "ended by --max-tokens", "device not known"] {
        assert!(error.contains(says), "{says}: {error}");
    }
    let one = model.run(&["--prompt", &prompt, "--max-tokens", "1"]);
    assert_eq!(one["decode_tokens_per_second"], Value::Null);
    let none = model.run(&["--prompt", &prompt, "--max-tokens", "0"]);
    assert_eq!((&none["first_token_seconds"], &none["text"]), (&Value::Null, &json!("")));
}

#[test]
fn do_texts_and_tokens_end_an_answer() {
    let model = Model::new(Some(TEMPLATE), json!({}));
    let prompt = text(1, 30);
    let run = |extra: &[&str]| {
        let base = ["--prompt", prompt.as_str(), "--temperature", "1.5", "--max-tokens", "30"];
        model.run(&[&base[..], extra].concat())
    };
    let free = run(&[]);
    let whole: Vec<char> = string(&free["text"]).chars().collect();
    let stop: String = whole[5..7].iter().collect();
    let at = string(&free["text"]).find(&stop).unwrap();
    let stopped = run(&["--stop", "nothing", "--stop", &stop]);
    assert_eq!(string(&stopped["text"]), &string(&free["text"])[..at]);
    assert_eq!((&stopped["ending"], &stopped["stop"]), (&json!("stop_text"), &json!(stop)));
    assert!(stopped["tokens"].as_u64() < free["tokens"].as_u64());

    // The fourth token, as one that ends a text: alone, or in a list.
    let id = whole[3] as u32 - 0x4e00;
    let cut = whole.iter().position(|&c| c == whole[3]).unwrap();
    for end in [json!(id), json!([1, id])] {
        model.write("generation_config.json", &json!({"eos_token_id": end}));
        let ended = run(&[]);
        assert_eq!(string(&ended["text"]).chars().collect::<Vec<_>>(), &whole[..cut]);
        assert_eq!(ended["ending"], "end_token");
    }
    model.write("generation_config.json", &json!({}));
    let end = json!({"chat_template": TEMPLATE, "eos_token": {"content": whole[3].to_string()}});
    model.write("tokenizer_config.json", &end);
    assert_eq!(run(&[])["ending"], "end_token", "the tokenizer's own end of text");
}

#[test]
fn do_the_models_settings_hold_unless_said_otherwise() {
    let makers = json!({"do_sample": true, "temperature": 1.5, "top_k": 40, "top_p": 0.9});
    let model = Model::new(Some(TEMPLATE), makers);
    let prompt = text(2, 20);
    let run = |extra: &[&str]| model.run(&[&["--prompt", prompt.as_str()], extra].concat());
    let drawn = run(&[]);
    assert_eq!(drawn["sampling"]["temperature"], 1.5);
    assert_eq!(drawn["sampling"]["from_model"], json!(["temperature", "top_k", "top_p"]));
    assert_eq!(drawn["text"], run(&["--seed", "0"])["text"], "the same seed, the same text");
    assert_ne!(drawn["text"], run(&["--seed", "1"])["text"]);
    let greedy = run(&["--temperature", "0"]);
    assert_eq!(greedy["text"], run(&["--top-k", "1"])["text"]);
    assert_eq!(greedy["text"], run(&["--top-p", "1e-9"])["text"]);
    assert_eq!(greedy["text"], run(&["--min-p", "1"])["text"]);
    assert_ne!(greedy["text"], drawn["text"]);
    // With a strong penalty nothing of the prompt or the answer comes again.
    let penalised = run(&["--temperature", "0", "--repetition-penalty", "1000"]);
    let answer: Vec<char> = string(&penalised["text"]).chars().collect();
    let fresh = |i: usize| !answer[..i].contains(&answer[i]) && !prompt.contains(answer[i]);
    assert!((0..answer.len()).all(fresh), "{answer:?}");
    let (_, _, error) = model.prism("run", &["--prompt", &prompt, "--max-tokens", "1"], "");
    assert!(error.contains("temperature 1.5 (the model's), top-k 40 (the model's)"), "{error}");
}

#[test]
fn is_the_density_of_every_head_reported_for_all_chunks() {
    let model = Model::new(Some(TEMPLATE), json!({}));
    let prompt = text(4, 300);
    let args = [
        "--prompt",
        &prompt,
        "--max-tokens",
        "1",
        "--report",
        "density",
        "--block",
        "16",
        "--high-dims",
        "16",
        "--low-dims",
        "24",
        "--dense-below",
        "0",
        "--mass",
        "0.6",
        "--calibration",
        "causal",
        "--dense-last-blocks",
        "0",
    ];
    let whole = model.run(&args);
    let chunked = model.run(&[&args[..], &["--chunk", "64"]].concat());
    let layers = whole["density_by_head"].as_array().unwrap();
    assert_eq!((layers.len(), &whole["path"]), (3, &json!("sparse")));
    let all: Vec<f64> = (layers.iter())
        .flat_map(|heads| heads.as_array().unwrap().iter().map(|d| d.as_f64().unwrap()))
        .collect();
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    assert!((mean - whole["density"].as_f64().unwrap()).abs() < 1e-12 && mean < 0.9, "{mean}");
    // Causal calibration selects the same in chunks of whole blocks, so that the densities agree.
    let other = chunked["density"].as_f64().unwrap();
    assert!((other - mean).abs() < 0.01, "chunks {other}, whole {mean}");
    let (_, _, error) = model.prism("run", &args, "");
    assert!(error.contains("by head"), "{error}");
}

#[test]
fn does_a_chat_equal_single_runs_and_read_only_what_is_new() {
    let model = Model::new(Some(TEMPLATE), json!({}));
    let users = [text(1, 40), text(2, 9), text(3, 20)];
    let lines: Vec<&str> = users.iter().map(String::as_str).collect();
    let args = ["--attention", "dense", "--max-tokens", "8"];
    let turns = model.chat(&args, &lines);
    assert_eq!(turns.len(), 3);
    let [s, e] = SPECIAL;
    let mut history = String::new();
    let mut held = 0;
    for (turn, user) in turns.iter().zip(&users) {
        history += &format!("{s}{user}{e}{s}");
        let single = model.run(&[&args[..], &["--raw", "--prompt", &history]].concat());
        assert_eq!(turn["text"], single["text"]);
        assert_eq!(turn["prompt_tokens"], single["prompt_tokens"]);
        assert_eq!(turn["reused_tokens"], held);
        let tokens = turn["tokens"].as_u64().unwrap();
        let ended = turn["ending"] == "end_token";
        held = turn["prompt_tokens"].as_u64().unwrap() + if ended { tokens } else { tokens - 1 };
        history += &format!("{}{e}", string(&turn["text"]));
    }
}

#[test]
fn is_the_cache_rolled_back_where_the_template_changes_the_history() {
    let model = Model::new(Some(FORGETFUL), json!({}));
    let users = [text(1, 40), text(2, 9)];
    let args = ["--attention", "dense", "--max-tokens", "8"];
    let turns = model.chat(&args, &[&users[0], &users[1]]);
    let [s, e] = SPECIAL;
    let kept: String = string(&turns[0]["text"]).chars().take(3).collect();
    let history = format!("{s}{}{e}{s}{kept}{e}{s}{}{e}{s}", users[0], users[1]);
    let single = model.run(&[&args[..], &["--raw", "--prompt", &history]].concat());
    assert_eq!(turns[1]["text"], single["text"]);
    assert_eq!(turns[1]["reused_tokens"], 43 + 3);
}

#[test]
fn does_a_chat_say_when_its_context_is_full_and_begin_anew() {
    let model = Model::new(Some(TEMPLATE), json!({}));
    let (long, short) = (text(1, 60), text(2, 20));
    let args = ["--context", "70", "--max-tokens", "5", "--attention", "dense"];
    let turns =
        model.chat(&args, &[&short, "", &long, &short, "/clear", &short, &long, "/exit", "x"]);
    assert_eq!(turns.len(), 5);
    let full = string(&turns[1]["error"]);
    assert!(full.contains("the context is full") && full.contains("the context 70"), "{full}");
    // The message that didn't fit is forgotten; a smaller one is answered.
    assert_eq!(turns[2]["prompt_tokens"].as_u64().unwrap(), 23 + 5 + 1 + 23);
    // Begun anew, the first answer again.
    assert_eq!((&turns[3]["text"], &turns[3]["reused_tokens"]), (&turns[0]["text"], &json!(0)));
    assert!(turns[4]["error"].is_string());

    let cut = &model.chat(&["--context", "25", "--max-tokens", "9"], &[&short])[0];
    assert_eq!((&cut["ending"], &cut["tokens"]), (&json!("context_full"), &json!(3)));
    let (ok, out, error) = model.prism("chat", &["--context", "25"], &short);
    assert!(ok && !out.is_empty() && error.contains("the context of 25 tokens is full"), "{error}");
}

#[test]
fn do_arguments_of_the_template_act_or_are_refused() {
    let model = Model::new(Some(TEMPLATE), json!({}));
    let tail = text(9, 4);
    let user = text(1, 10);
    let plain = model.run(&["--prompt", &user]);
    assert_eq!(plain["prompt_tokens"], 13);
    let tailed = model.run(&["--prompt", &user, "--template-arg", &format!("tail={tail}")]);
    assert_eq!(tailed["prompt_tokens"], 17);
    let system = model.run(&["--prompt", &user, "--system", &tail]);
    assert_eq!(system["prompt_tokens"], 13 + 6);
    let error = model.refused(&["--prompt", &user, "--template-arg", "tale=1"]);
    assert!(
        error.contains("--template-arg tale: the model's chat template doesn't read"),
        "{error}"
    );

    let bare = Model::new(None, json!({}));
    let error = bare.refused(&["--prompt", &user, "--system", "x"]);
    assert!(error.contains("need a chat template"), "{error}");
    let (ok, _, error) = bare.prism("run", &["--prompt", &user, "--max-tokens", "1"], "");
    assert!(ok && error.contains("no chat template: the prompt is taken as it is"), "{error}");
    let (ok, _, error) = bare.prism("chat", &[], "x");
    assert!(!ok && error.contains("no chat template"), "{error}");
}

#[test]
fn are_arguments_that_do_nothing_or_harm_refused_by_name() {
    let model = Model::new(Some(TEMPLATE), json!({}));
    let cases: [(&[&str], &str); 14] = [
        (&["--top-p", "0.5"], "--top-p does nothing at temperature 0"),
        (&["--seed", "1"], "--seed does nothing at temperature 0"),
        (&["--temperature", "nan"], "temperature is NaN"),
        (&["--top-p", "0", "--temperature", "1"], "top_p is 0"),
        (&["--min-p", "2", "--temperature", "1"], "min_p is 2"),
        (&["--repetition-penalty", "0"], "repetition penalty is 0"),
        (&["--stop", ""], "--stop must not be empty"),
        (&["--chunk", "0"], "--chunk"),
        (&["--report", "density", "--attention", "dense"], "--report density needs"),
        (&["--raw", "--system", "x"], "--system"),
        (&["--raw", "--template-arg", "x=1"], "--template-arg"),
        (&["--template-arg", "x"], "--template-arg must be NAME=VALUE"),
        (&["--template-arg", "messages=[]"], "--template-arg messages"),
        (&["--prompt-file", "x"], "--prompt-file"),
    ];
    for (args, says) in cases {
        let error = model.refused(&[&["--prompt", "x"], args].concat());
        assert!(error.contains(says), "{args:?} says {error}");
    }
    let (ok, _, error) = model.prism("chat", &["--max-tokens", "0"], "");
    assert!(!ok && error.contains("--max-tokens must be at least 1"), "{error}");
    let (ok, _, error) = model.prism("chat", &["--context", "0"], "");
    assert!(!ok && error.contains("--context"), "{error}");
    // And what the model's own files get wrong.
    model.write("generation_config.json", &json!({"do_sample": true, "temperature": -1}));
    assert!(model.refused(&["--prompt", "x"]).contains("temperature is -1"));
    model.write("generation_config.json", &json!({"top_k": "many"}));
    assert!(model.refused(&["--prompt", "x"]).contains("generation_config.json"));
}

/// Greedy and sampled, in chunks and stopped: of each prompt what `--prompt` gives.
#[test]
fn are_prompts_answered_together_as_each_would_be_alone() {
    let model = Model::new(Some(TEMPLATE), json!({}));
    let prompts = [text(3, 100), text(5, 7), text(9, 41)];
    let file = model.folder.path().join("prompts.jsonl");
    let lines = prompts.each_ref().map(|prompt| format!("{}\n\n", json!(prompt)));
    std::fs::write(&file, lines.concat()).unwrap();
    let file = file.to_str().unwrap();
    let stop = string(&model.run(&["--prompt", &prompts[1], "--max-tokens", "9"])["text"])
        .chars()
        .nth(4)
        .unwrap()
        .to_string();
    let cases: [&[&str]; 4] = [
        &["--stop", &stop],
        &["--chunk", "16", "--report", "density", "--block", "16", "--dense-below", "32"],
        &["--temperature", "1", "--seed", "7", "--repetition-penalty", "1.2"],
        &["--raw", "--attention", "dense"],
    ];
    for args in cases {
        let args = [&["--max-tokens", "9"], args].concat();
        let together = model.run(&[&["--prompts", file][..], &args].concat());
        let answers = together["answers"].as_array().unwrap();
        assert_eq!(answers.len(), prompts.len());
        for (prompt, answer) in prompts.iter().zip(answers) {
            let alone = model.run(&[&["--prompt", prompt][..], &args].concat());
            let answer = answer.as_object().unwrap();
            for (name, value) in answer {
                assert_eq!(value, &alone[name], "{args:?}: {name}");
            }
        }
        let sum = |name: &str| answers.iter().map(|one| one[name].as_u64().unwrap()).sum::<u64>();
        assert_eq!(together["tokens"], sum("tokens"));
        assert_eq!(together["prompt_tokens"], sum("prompt_tokens"));
        assert!(together["prefill_seconds"].as_f64().unwrap() > 0.0);
    }
    let (ok, out, error) =
        model.prism("run", &["--prompts", file, "--max-tokens", "3", "--seed", "1"], "");
    assert!(!ok && out.is_empty() && error.contains("--seed does nothing"), "{error}");
    let (ok, out, error) = model.prism("run", &["--prompts", file, "--max-tokens", "3"], "");
    assert!(ok, "{error}");
    let begins: Vec<_> = out.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(begins, ["[0]", "[1]", "[2]"]);
    assert!(error.contains("[2] prompt: 44 tokens") && error.contains("answers: 9 tokens"));
}

#[test]
fn are_files_that_hold_no_prompts_refused_by_name() {
    let model = Model::new(Some(TEMPLATE), json!({}));
    let file = model.folder.path().join("prompts.jsonl");
    let path = file.to_str().unwrap();
    for (content, raw, says) in [
        ("", false, "at least 1 prompt, got 0"),
        ("\n  \n", false, "at least 1 prompt, got 0"),
        ("\"a\"\nb\n", false, "prompts.jsonl, line 2: not a JSON string"),
        ("{\"prompt\": \"a\"}", false, "line 1: not a JSON string"),
        (
            &format!("\"{}\"\n\"\"\n", text(1, 3)),
            true,
            "prompt 1 must hold at least 1 token, got 0",
        ),
    ] {
        std::fs::write(&file, content).unwrap();
        let args = [&["--prompts", path][..], if raw { &["--raw"] } else { &[] }].concat();
        let error = model.refused(&args);
        assert!(error.contains(says), "{content:?} says {error}");
    }
    std::fs::remove_file(&file).unwrap();
    assert!(model.refused(&["--prompts", path]).contains("can't read"));
    assert!(model.refused(&["--prompts", path, "--prompt", "x"]).contains("--prompts"));
    assert!(model.refused(&[]).contains("--prompt <PROMPT>"));
}

/// Ctrl-C ends an answer that would go on for long, then another message is answered; at the prompt it
/// ends the program.
#[cfg(unix)]
#[test]
fn does_an_interrupt_end_the_answer_and_not_the_conversation() {
    use std::io::{BufRead, BufReader, Read};

    let model = Model::new(Some(TEMPLATE), json!({}));
    let mut child = Command::new(env!("CARGO_BIN_EXE_prism"))
        .args(["chat", "--model", model.folder.path().to_str().unwrap()])
        .args(["--context", "60000", "--max-tokens", "50000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let interrupt = |id: u32| {
        let sent = Command::new("kill").args(["-INT", &id.to_string()]).status().unwrap();
        assert!(sent.success());
    };
    let mut input = child.stdin.take().unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    for turn in 0..2 {
        input.write_all(format!("{}\n", text(turn, 5)).as_bytes()).unwrap();
        // The answer has begun.
        output.read_exact(&mut [0]).unwrap();
        interrupt(child.id());
        let ended = said.find(|line| line.starts_with("answer: ")).unwrap();
        assert!(ended.contains("ended by Ctrl-C"), "{ended}");
        // The end of the answer.
        let mut byte = [0];
        while byte != *b"\n" {
            output.read_exact(&mut byte).unwrap();
        }
    }
    // Told apart from an answer: nothing is being said.
    assert!(said.any(|line| line.starts_with("peak memory")));
    interrupt(child.id());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// SmolLM2-135M-Instruct from `PRISM_MODEL`, with its own template in GGUF metadata.
#[test]
fn does_a_real_model_hold_a_conversation() {
    let path = std::env::var("PRISM_MODEL")
        .expect("PRISM_MODEL is not set: run `cargo xtask test`, or set it to `cargo xtask fetch`");
    let args = ["chat", "--model", &path, "--temperature", "0", "--max-tokens", "16", "--json"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_prism"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = b"What is the capital of France?\nAnd what is the capital of Germany?\n";
    child.stdin.take().unwrap().write_all(lines).unwrap();
    let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let turns: Vec<Value> =
        output.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(string(&turns[0]["text"]).contains("Paris"), "{output}");
    assert!(string(&turns[1]["text"]).contains("Berlin"), "{output}");
    assert_eq!(turns[0]["ending"], "end_token");
    // What the first turn read and said was not read again.
    let held = turns[0]["prompt_tokens"].as_u64().unwrap() + turns[0]["tokens"].as_u64().unwrap();
    assert_eq!(turns[1]["reused_tokens"].as_u64(), Some(held));
}
