//! Where in an object something is.

use std::fmt;

/// A place in an object, such as `spec.rules[0].ttl`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FieldPath {
    steps: Vec<Step>,
}

/// One step into an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// To the value of a key.
    Key(String),
    /// To an element of a list.
    Index(usize),
}

impl FieldPath {
    /// The object itself.
    pub fn root() -> Self {
        Self::default()
    }

    /// The place under `key`.
    #[must_use]
    pub fn key(&self, key: impl Into<String>) -> Self {
        self.join(Step::Key(key.into()))
    }

    /// The place of element `index`.
    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        self.join(Step::Index(index))
    }

    fn join(&self, step: Step) -> Self {
        let mut steps = self.steps.clone();
        steps.push(step);
        Self { steps }
    }

    /// The steps, from the object inwards.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The steps with `[]` for every index, such as `spec.rules[].ttl`.
    pub fn shape(&self) -> String {
        let mut text = String::new();
        for step in &self.steps {
            match step {
                Step::Key(key) if text.is_empty() => text.push_str(key),
                Step::Key(key) => {
                    text.push('.');
                    text.push_str(key);
                }
                Step::Index(_) => text.push_str("[]"),
            }
        }
        text
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.steps.iter().enumerate() {
            match step {
                Step::Key(key) if at == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// Shorthand: `at!("spec", "rules", 3, "ttl")` is `spec.rules[3].ttl`.
macro_rules! at {
    ($($step:expr),* $(,)?) => {
        crate::api::path::FieldPath::root()$(.join_any($step))*
    };
}
pub(crate) use at;

/// What [`at!`] accepts as a step.
pub(crate) trait IntoStep {
    /// The step itself.
    fn into_step(self) -> Step;
}

impl IntoStep for &str {
    fn into_step(self) -> Step {
        Step::Key(self.to_owned())
    }
}

impl IntoStep for usize {
    fn into_step(self) -> Step {
        Step::Index(self)
    }
}

impl FieldPath {
    /// The place one step further in.
    pub(crate) fn join_any(mut self, step: impl IntoStep) -> Self {
        self.steps.push(step.into_step());
        self
    }
}
