//! A client's own connection, messages between clients, and Larder's own commands.

use super::super::{Access, Class, CommandSpec, Gather, Refusal, Ttl};
use super::{R1, ROUTE_1, ROUTE_ALL, group, plain, row};

const CLIENT: &[CommandSpec] = &[
    plain("client|caching", 3, Class::Connection),
    plain("client|capa", -3, Class::Connection),
    plain("client|getname", 2, Class::Connection),
    plain("client|getredir", 2, Class::Connection),
    plain("client|help", 2, Class::Connection),
    plain("client|id", 2, Class::Connection),
    plain("client|import-source", 3, Class::Connection),
    plain("client|info", 2, Class::Connection),
    plain("client|kill", -3, Class::Connection),
    plain("client|list", -2, Class::Connection),
    plain("client|no-evict", 3, Class::Connection),
    plain("client|no-touch", 3, Class::Connection),
    // It would hold up every other workload.
    plain("client|pause", -3, Class::Refused(Refusal::Lifecycle)),
    plain("client|reply", 3, Class::Connection),
    plain("client|setinfo", 4, Class::Connection),
    plain("client|setname", 3, Class::Connection),
    plain("client|tracking", -3, Class::Connection),
    plain("client|trackinginfo", 2, Class::Connection),
    plain("client|unblock", -3, Class::Connection),
    plain("client|unpause", 2, Class::Refused(Refusal::Lifecycle)),
];

const PUBSUB: &[CommandSpec] = &[
    plain("pubsub|channels", -2, Class::AllShards(Gather::Union)),
    plain("pubsub|help", 2, Class::AnyNode),
    plain("pubsub|numpat", 2, Class::AllShards(Gather::Sum)),
    plain("pubsub|numsub", -2, Class::AllShards(Gather::SumPairs)),
    plain("pubsub|shardchannels", -2, Class::AllShards(Gather::Union)),
    plain("pubsub|shardnumsub", -2, Class::AllShards(Gather::SumPairs)),
];

pub(super) const COMMANDS: &[CommandSpec] = &[
    plain("asking", 1, Class::Connection),
    plain("auth", -2, Class::Connection),
    group("client", -2, Class::Connection, CLIENT),
    plain("echo", 2, Class::Connection),
    plain("hello", -1, Class::Connection),
    plain("ping", -1, Class::Connection),
    plain("quit", -1, Class::Connection),
    plain("readonly", 1, Class::Connection),
    plain("readwrite", 1, Class::Connection),
    plain("reset", 1, Class::Connection),
    plain("select", 2, Class::Connection),
    // Messages.
    plain("psubscribe", -2, Class::PubSub),
    plain("publish", 3, Class::Publish),
    group("pubsub", -2, Class::AnyNode, PUBSUB),
    plain("punsubscribe", -1, Class::PubSub),
    row("spublish", 3, Class::Publish, Access::None, ROUTE_1, Ttl::Keeps),
    row("ssubscribe", -2, Class::PubSub, Access::None, ROUTE_ALL, Ttl::Keeps),
    plain("subscribe", -2, Class::PubSub),
    row("sunsubscribe", -1, Class::PubSub, Access::None, ROUTE_ALL, Ttl::Keeps),
    plain("unsubscribe", -1, Class::PubSub),
    // Larder's own.
    row("larder.explain", 2, Class::Larder, Access::None, R1, Ttl::Keeps),
    row("larder.fetch", -2, Class::Larder, Access::None, R1, Ttl::Keeps),
    row("larder.fill", -4, Class::Larder, Access::None, R1, Ttl::Keeps),
    plain("larder.invalidate", -2, Class::Larder),
    plain("larder.stats", -1, Class::Larder),
];
