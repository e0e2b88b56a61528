//! Every bad file has an answer: a particular error or a documented result, never a panic, a hang
//! or an allocation that the file's size does not justify.

mod config;
mod gguf;
mod paths;
mod safetensors;
mod shards;
mod support;
mod template;
mod tokenizer;
