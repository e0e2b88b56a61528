//! The selectors on the host: does each choose what its definition says, and do all keep to what
//! attention relies on?

mod by_definition;
mod by_hand;
mod properties;
mod support;
