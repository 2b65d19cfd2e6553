//! Events of invalidation: the stream in the cache that anyone may write, and what those who read it keep beside it.
//!
//! What is kept lies in the stream's slot, so that one script covers it. Each binding reads the whole stream for itself: another's
//! sidecars may not touch its keys.

use super::binding::BindingName;

/// The stream: `XADD larder:events * key user:7`, in database 0.
pub const STREAM: &str = "larder:events";

/// The key that the one of a binding's sidecars holds which reads the stream; of those without one, where there is none.
pub fn turn_key(binding: Option<&BindingName>) -> String {
    beside("larder:er", binding)
}

/// The hash that tells how far they have read, and how far what takes longer has come.
pub fn state_key(binding: Option<&BindingName>) -> String {
    beside("larder:es", binding)
}

/// The key that the relay holds which reads a feed, by the name of its slot.
pub fn feed_claim_key(slot: &str) -> String {
    format!("larder:cr:{{{STREAM}}}{slot}")
}

/// The hash that tells up to where a feed's events were written.
pub fn feed_state_key(slot: &str) -> String {
    format!("larder:cs:{{{STREAM}}}{slot}")
}

/// The field of that hash that tells since when nothing may be shown that was cached before: the id of the last event that was written since changes
/// may have been lost.
pub const LAPSE_FIELD: &str = "lapse";

fn beside(kind: &str, binding: Option<&BindingName>) -> String {
    format!("{kind}:{{{STREAM}}}{}", binding.map_or("", BindingName::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_binding_has_its_own() {
        let shop = BindingName::of("Deployment", "shop", "main");
        assert_eq!(turn_key(Some(&shop)), format!("larder:er:{{larder:events}}{shop}"));
        assert_eq!(state_key(None), "larder:es:{larder:events}");
        assert_eq!(feed_claim_key("larder_main_db"), "larder:cr:{larder:events}larder_main_db");
        assert_eq!(feed_state_key("larder_main_db"), "larder:cs:{larder:events}larder_main_db");
    }
}
