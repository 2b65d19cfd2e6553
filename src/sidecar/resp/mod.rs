//! The wire: a resumable, bounded scanner over RESP2 and RESP3.
