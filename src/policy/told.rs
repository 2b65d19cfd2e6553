//! The mark by which a server is known to have been told of workloads' users before the file of its users came.
//!
//! A control plane sets users at a server at once, and the file brings the same a minute later. Until then an agent that made users what
//! its file says would undo that. So the control plane first puts a mark there, a user that cannot log in and whose one rule holds the
//! generation that it is about to tell; the agent leaves workloads' users alone while the mark is newer than its file, and says so in its
//! report; and only then they are set. The mark is in the server's memory, as the users are: with the process both go, and the file counts.

/// The name of the mark. No one logs in by it.
pub const MARK: &str = "larder-told";

/// What stands before the generation.
const PREFIX: &str = "~users:";

/// The rules of the mark, as `ACL SETUSER` takes them.
pub fn rules(generation: u64) -> [String; 3] {
    ["reset".to_owned(), "off".to_owned(), format!("{PREFIX}{generation}")]
}

/// The generation in the keys of the mark, as `ACL GETUSER` shows them.
pub fn generation(keys: &str) -> Option<u64> {
    keys.trim().strip_prefix(PREFIX)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generation_is_read_back() {
        let [.., keys] = rules(42);
        assert_eq!(generation(&keys), Some(42));
        for keys in ["", "~*", "~users:", "~users:x", "~users:1 ~*"] {
            assert_eq!(generation(keys), None, "{keys}");
        }
    }
}
