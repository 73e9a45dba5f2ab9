//! HTTP/1.0 and 1.1, our own code on httparse: one task a connection, no channel, heads parsed once.

pub(crate) mod answer;
pub(crate) mod body;
pub mod chunked;
pub(crate) mod connection;
pub(crate) mod deadline;
pub(crate) mod decide;
pub(crate) mod exchange;
pub(crate) mod fields;
pub(crate) mod front_check;
pub(crate) mod h2;
pub(crate) mod h3;
pub mod head;
pub(crate) mod mux;
pub(crate) mod outcome;
pub(crate) mod plain;
pub(crate) mod request;
pub(crate) mod response;
pub(crate) mod served;
