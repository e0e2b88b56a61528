//! Every test of the tensor functions and the models, a module a question.

mod agrees_with_oracle;
mod bad_input;
mod bad_numbers;
mod bad_settings;
mod batches;
mod chunked_equals_whole;
mod docs_match_code;
mod gradients;
mod head_overrides;
mod invariants;
mod kernel_fixtures;
mod linear;
mod model_fixtures;
mod packed;
mod policies;
mod rope_probe;
mod rotated;
mod selector_parts;
mod selector_problem;
mod selectors;
mod smollm2;
