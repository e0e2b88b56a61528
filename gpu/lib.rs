//! What a GPU machine is asked, and what it answered.

pub mod report;
