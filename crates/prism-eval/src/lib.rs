//! What sparse attention keeps and loses, measured: everything seeded, resumable and without a network.
//!
//! Reading order: [`attend`] (ways to attend, by name), [`store`] (results that outlive a run), [`perplexity`],
//! [`ablate`]; [`task`] and [`score`] (questions, answers), [`needle`], [`ruler`], [`longbench`],
//! [`infinitebench`]; [`recall`] and [`spectrum`], which look at the Q, K and V of each layer; [`rows`] and
//! [`plots`] (what is shown).

pub mod ablate;
pub mod attend;
pub mod error;
pub mod haystack;
pub mod infinitebench;
mod lines;
pub mod longbench;
pub mod needle;
pub mod pareto;
pub mod perplexity;
pub mod plots;
pub mod progress;
mod prompts;
pub mod recall;
pub mod rows;
pub mod ruler;
pub mod score;
pub mod spectrum;
pub mod store;
pub mod task;
mod words;

pub use attend::Attend;
pub use error::{EvalError, Result};
pub use haystack::Haystack;
pub use progress::{Progress, Silent};
pub use store::Store;
