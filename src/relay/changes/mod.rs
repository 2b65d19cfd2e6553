//! What databases changed, on its way to the keys that are made from it.
//!
//! One relay at a time reads a database's changes, which a claim in the cache names ([`keeper`]). Its [`reader`] writes what they mean into the
//! stream of events, which sidecars carry out, and lets the database forget what was written; where nobody follows it any more, a [`remover`]
//! takes away what was made there. [`rows`] says which keys a changed row is about,
//! [`wanted`] what is to be said of them, [`register`] how it is written together with the position up to which it was, and [`course`] where
//! to begin and when to say what, with [`transit`] for how old what is read has become on its way, and [`clock`] for when that is by the cache's clock.
//! These six are pure.
//!
//! Nothing is lost unnoticed: what is not written is not confirmed, and the database tells it again; and where the cache loses what was written,
//! it loses the position as well, which whoever writes next finds out.

pub mod clock;
pub mod course;
pub mod figures;
pub mod followed;
pub mod keeper;
pub mod reader;
pub mod register;
pub mod remover;
pub mod rows;
pub mod transit;
pub mod wanted;
