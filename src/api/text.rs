//! How the texts inside the resources look in their schemas: bounds, and rules whose messages say what to write instead.
//!
//! Each type here stands for the schema of a text; it is never built. The rules are at least as strict as the parsers in
//! [`crate::policy::units`], so what the API server lets pass also parses.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

/// The most rules in one policy.
pub const MAX_RULES: usize = 256;
/// The most origins in one policy.
pub const MAX_ORIGINS: usize = 16;
/// The most configuration parameters of one cluster.
pub const MAX_PARAMETERS: usize = 64;
/// The longest tag, as a template.
pub const MAX_TAG_CHARS: usize = 128;
/// The longest SQL statement or path.
pub const MAX_QUERY_CHARS: usize = 4096;

macro_rules! text_schemas {
    ($($(#[$doc:meta])* $name:ident { max: $max:expr, rule: $rule:expr, message: $message:expr $(,)? })+) => {$(
        $(#[$doc])*
        pub enum $name {}

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({
                    "type": "string",
                    "minLength": 1,
                    "maxLength": $max,
                    "x-kubernetes-validations": [{ "rule": $rule, "message": $message }],
                })
            }
        }
    )+};
}

text_schemas! {
    /// A length of time of at most one year: [`crate::policy::Span`].
    DurationText {
        max: 24,
        rule: "self.matches('^(0|([0-9]{1,4}h|[0-9]{1,6}m|[0-9]{1,8}s|[0-9]{1,11}ms){1,4})$') && duration(self) <= duration('8760h')",
        message: "write a duration in whole numbers with units, such as 250ms, 10s, 5m or 1h30m, of at most 8760h",
    }
    /// A length of time above zero and of at most one year.
    PositiveDurationText {
        max: 24,
        rule: "self.matches('^([0-9]{1,4}h|[0-9]{1,6}m|[0-9]{1,8}s|[0-9]{1,11}ms){1,4}$') && duration(self) > duration('0s') && duration(self) <= duration('8760h')",
        message: "write a duration above zero in whole numbers with units, such as 250ms, 10s, 5m or 1h30m, of at most 8760h",
    }
    /// How often something is done in the background.
    PeriodText {
        max: 24,
        rule: "self.matches('^([0-9]{1,4}h|[0-9]{1,6}m|[0-9]{1,8}s|[0-9]{1,11}ms){1,4}$') && duration(self) >= duration('10s') && duration(self) <= duration('24h')",
        message: "write a duration from 10s to 24h in whole numbers with units, such as 90s, 10m or 1h30m",
    }
    /// How long a command is tried.
    PatienceText {
        max: 24,
        rule: "self.matches('^([0-9]{1,2}m|[0-9]{1,3}s|[0-9]{1,5}ms){1,3}$') && duration(self) >= duration('100ms') && duration(self) <= duration('1m')",
        message: "write a duration from 100ms to 1m in whole numbers with units, such as 500ms, 8s or 1m",
    }
    /// The memory of a server: a [`crate::policy::ByteSize`] that leaves an empty one room to work.
    MemoryText {
        max: 8,
        rule: "self.matches('^((1[6-9]|[2-9][0-9]|[1-9][0-9]{2,5})(Mi|M)|[1-9][0-9]{0,3}(Gi|G))$')",
        message: "write at least 16Mi, as in 512Mi or 4Gi",
    }
    /// The size of a volume.
    StorageText {
        max: 8,
        rule: "self.matches('^([1-9][0-9]{0,5}(Mi|M)|[1-9][0-9]{0,4}(Gi|G)|[1-9][0-9]{0,2}(Ti|T))$')",
        message: "write a size such as 512Mi, 10Gi or 1Ti",
    }
    /// How old a write in a journal may become.
    JournalLagText {
        max: 24,
        rule: "self.matches('^([0-9]{1,4}h|[0-9]{1,6}m|[0-9]{1,8}s|[0-9]{1,11}ms){1,4}$') && duration(self) >= duration('1s') && duration(self) <= duration('24h')",
        message: "write a duration from 1s to 24h in whole numbers with units, such as 30s or 5m",
    }
    /// What a journal may hold: at least [`crate::policy::snapshot::LEAST_BYTES`].
    JournalBytesText {
        max: 8,
        rule: "self.matches('^((6[4-9]|[7-9][0-9]|[1-9][0-9]{2,5})Mi|[1-9][0-9]{0,3}Gi)$')",
        message: "write at least 64Mi, as in 256Mi or 1Gi: a single command may bring a mebibyte to one of sixteen partitions",
    }
    /// A length of time in whole seconds, up to an hour.
    LagText {
        max: 24,
        rule: "self.matches('^([0-9]{1,2}h|[0-9]{1,4}m|[0-9]{1,6}s){1,3}$') && duration(self) >= duration('1s') && duration(self) <= duration('1h')",
        message: "write a duration from 1s to 1h in whole seconds, such as 10s",
    }
    /// An amount of CPU.
    CpuText {
        max: 8,
        rule: "self.matches('^([1-9][0-9]{0,5}m|[1-9][0-9]{0,2}([.][0-9]{1,3})?|0[.]([0-9]{0,2}[1-9]|[1-9][0-9]{0,2}))$')",
        message: "write CPUs or thousandths of one, such as 2, 0.5 or 500m",
    }
    /// The key of a label or a taint.
    LabelKeyText {
        max: 317,
        rule: "self.matches('^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$')",
        message: "write a key such as dedicated or example.com/dedicated",
    }
    /// The value of a label or a taint.
    LabelValueText {
        max: 63,
        rule: "self.matches('^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$')",
        message: "write a label's value: letters, digits, dashes, underscores and dots",
    }
    /// A share in whole per cent: [`crate::policy::Percent`].
    PercentText {
        max: 4,
        rule: "self.matches('^(100|[0-9]{1,2})%$')",
        message: "write a share in whole per cent from 0% to 100%, such as 10%",
    }
    /// What rules and origins are called.
    NameText {
        max: 63,
        rule: "self.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        message: "write a name of lower-case letters, digits and dashes that begins with a letter, such as user-profile",
    }
    /// The name of a column.
    ColumnText {
        max: 63,
        rule: "self.matches('^[A-Za-z_][A-Za-z0-9_]*$')",
        message: "write the name of a column, such as row_version, or ETag for an http origin",
    }
    /// The name of a table: [`crate::policy::changes::TableName`].
    TableText {
        max: 127,
        rule: "self.matches('^[^.\"]{1,63}([.][^.\"]{1,63})?$')",
        message: "write TABLE, of the schema public, or SCHEMA.TABLE, as the catalogue has them, without quotes",
    }
    /// The name of a replication slot or a publication.
    SlotText {
        max: 63,
        rule: "self.matches('^[a-z0-9_]+$')",
        message: "write lower-case letters, digits and underscores, such as larder_shop",
    }
    /// The name of another object.
    ObjectNameText {
        max: 253,
        rule: "self.matches('^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$')",
        message: "write the name of an object: lower-case letters, digits, dashes and dots",
    }
    /// The name of one entry in a Secret.
    SecretKeyText {
        max: 253,
        rule: "self.matches('^[-._a-zA-Z0-9]+$')",
        message: "write the name of an entry in the Secret: letters, digits, dashes, dots and underscores",
    }
    /// A key pattern: [`crate::policy::KeyPattern`].
    PatternText {
        max: crate::policy::pattern::MAX_PATTERN_BYTES,
        rule: "self.matches('^([^{}]|[{][{]|[}][}]|[{][a-zA-Z][a-zA-Z0-9_]*(…|[.][.][.])?[}])+$') && (self.contains('{') || !self.contains('*'))",
        message: "write the keys with their parts in braces: user:{id} covers user:7, page:{path…} also covers page:a:b; there are no globs, and {{ and }} stand for the braces themselves",
    }
    /// A tag, as a pattern over the parts of a key: [`crate::policy::tags`].
    TagText {
        max: MAX_TAG_CHARS,
        rule: "self.matches('^([^{}]|[{][{]|[}][}]|[{][a-zA-Z][a-zA-Z0-9_]*(…|[.][.][.])?[}])+$') && (self.contains('{') || !self.contains('*'))",
        message: "write a tag with parts of the key in braces: under keys cart:{user}:{shop} the tag user:{user} of cart:7:tea is user:7; there are no globs",
    }
    /// The version of Redis or Valkey.
    VersionText {
        max: 16,
        rule: "self.matches('^([7-9]|[1-9][0-9])[.][0-9]{1,3}([.][0-9]{1,3})?$')",
        message: "write the version as in \"7.2\" or \"8.1.3\", in quotes; Larder needs Redis 7.0, Valkey 7.2 or newer",
    }
    /// The name of an ACL user.
    UserText {
        max: 64,
        rule: "self.matches('^[a-zA-Z0-9][-._a-zA-Z0-9]*$')",
        message: "write a user of letters, digits, dashes, dots and underscores",
    }
    /// What tells one request from the next.
    RequestText {
        max: 64,
        rule: "self.matches('^[-+._:a-zA-Z0-9]+$')",
        message: "write letters, digits, dashes, dots, colons or underscores, such as a date",
    }
    /// A URL or a password.
    SensitiveText {
        max: 2048,
        rule: "!self.contains('\\n') && !self.contains('\\r')",
        message: "write it on one line",
    }
    /// The name of a container image.
    ImageText {
        max: 512,
        rule: "self.matches('^[a-z0-9][-._/:@a-zA-Z0-9]*$')",
        message: "write an image such as docker.io/valkey/valkey:8.1",
    }
    /// An SQL statement.
    SqlText {
        max: MAX_QUERY_CHARS,
        rule: "!self.contains('\\u0000')",
        message: "an SQL statement has no NUL characters",
    }
    /// A path of an HTTP origin.
    HttpPathText {
        max: MAX_QUERY_CHARS,
        rule: "self.startsWith('/') && !self.matches('[[:space:]]')",
        message: "write a path that begins with a slash and has no blanks, such as /products/{id}",
    }
}
