//! The clients: who they are, what they send, and what they write down about it.

pub mod http;
