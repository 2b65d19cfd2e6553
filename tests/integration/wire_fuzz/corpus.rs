//! What mutations begin with: frames of every type, written by hand and as real servers send them.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use crate::support::resp::encode;
use crate::support::server::{Engine, Redis};

/// At least one frame of each type of RESP2 and RESP3, and of each way to nest them.
pub fn written_replies() -> Vec<Vec<u8>> {
    [
        &b"+OK\r\n"[..],
        b"+\r\n",
        b"-ERR unknown command\r\n",
        b":0\r\n",
        b":-9223372036854775808\r\n",
        b":9223372036854775807\r\n",
        b"$5\r\nhello\r\n",
        b"$0\r\n\r\n",
        b"$-1\r\n",
        b"$12\r\n*1\r\n$1\r\n+a\r\n\r\n",
        b"$4\r\n\0\r\n\xff\r\n",
        b"*0\r\n",
        b"*-1\r\n",
        b"*2\r\n$1\r\na\r\n$-1\r\n",
        b"*3\r\n:1\r\n*2\r\n+a\r\n-b\r\n$1\r\nc\r\n",
        b"*1\r\n*1\r\n*1\r\n*1\r\n*0\r\n",
        b"_\r\n",
        b"#t\r\n",
        b"#f\r\n",
        b",3.25\r\n",
        b",inf\r\n",
        b",-inf\r\n",
        b",1e308\r\n",
        b"(3492890328409238509324850943850943825024385\r\n",
        b"!21\r\nSYNTAX invalid syntax\r\n",
        b"=8\r\ntxt:text\r\n",
        b"=4\r\nmkd:\r\n",
        b"~2\r\n+a\r\n:1\r\n",
        b"~0\r\n",
        b"%2\r\n+a\r\n:1\r\n+b\r\n*1\r\n,2\r\n",
        b"%0\r\n",
        b">3\r\n+message\r\n$1\r\nc\r\n$2\r\nhi\r\n",
        b"|1\r\n+ttl\r\n:3600\r\n$1\r\nv\r\n",
        b"|1\r\n+ttl\r\n%1\r\n+a\r\n:1\r\n*2\r\n:1\r\n:2\r\n",
        b"*2\r\n|1\r\n+popularity\r\n,0.5\r\n:1\r\n#t\r\n",
        b"%1\r\n$1\r\nk\r\n~2\r\n_\r\n(12345678901234567890\r\n",
    ]
    .map(<[u8]>::to_vec)
    .to_vec()
}

/// What real servers answer, in both protocols.
pub fn real_replies() -> Vec<Vec<u8>> {
    let mut replies = Vec::new();
    for engine in Engine::ALL {
        let server = Redis::start(engine);
        for protocol in ["2", "3"] {
            let mut talk = Talk::new(server.port());
            replies.push(talk.ask(&format!("HELLO {protocol}")));
            replies.extend(LINES.map(|line| talk.ask(line)));
            for kind in
                ["string", "integer", "double", "null", "array", "set", "map", "attrib", "bignum", "verbatim", "true", "false"]
            {
                replies.push(talk.ask(&format!("DEBUG PROTOCOL {kind}")));
            }
        }
    }
    replies
}

/// Commands with replies of every shape.
const LINES: [&str; 42] = [
    "FLUSHALL",
    "PING",
    "GET nothing",
    "SET k value",
    "GET k",
    "INCR n",
    "INCRBYFLOAT f 0.5",
    "LPUSH k x",
    "NOPE a b",
    "GET",
    "RPUSH l a b c",
    "LRANGE l 0 -1",
    "LPOP nothing 3",
    "LPOP nothing",
    "HSET h a 1 b 2",
    "HGETALL h",
    "HRANDFIELD h 2 WITHVALUES",
    "SADD s a b c",
    "SMEMBERS s",
    "ZADD z 1 a 2.5 b",
    "ZADD z INCR 1 a",
    "ZRANGE z 0 -1 WITHSCORES",
    "ZSCORE z b",
    "ZPOPMIN nothing",
    "XADD x 1-1 f v",
    "XRANGE x - +",
    "XREAD STREAMS x 0",
    "XINFO STREAM x FULL",
    "GEOADD g 13.36 38.11 p",
    "GEOPOS g p nobody",
    "MGET k nothing l",
    "SCAN 0",
    "INFO clients",
    "CLIENT LIST",
    "COMMAND DOCS GET",
    "COMMAND INFO GET NOPE",
    "CONFIG GET maxmemory*",
    "OBJECT HELP",
    "MEMORY STATS",
    "EVAL return{1,'a',{2,false},{err='MY@error'},{ok='fine'}} 0",
    "EVAL return{double=3.5} 0",
    "MULTI; HGETALL h; EXEC",
];

/// A connection that keeps replies as they come.
struct Talk(TcpStream);

impl Talk {
    fn new(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the server accepts");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        Self(stream)
    }

    /// The bytes of the replies to commands: all that comes before the reply to an ECHO.
    fn ask(&mut self, lines: &str) -> Vec<u8> {
        const END: &[u8] = b"$11\r\nend-of-this\r\n";
        let commands: Vec<u8> = lines.split("; ").flat_map(|line| encode(&line.split(' ').collect::<Vec<_>>())).collect();
        self.0.write_all(&[commands, encode(&["ECHO", "end-of-this"])].concat()).expect("the server reads");
        let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
        while !bytes.ends_with(END) {
            let count = self.0.read(&mut chunk).expect("the server answers");
            assert!(count > 0, "the server closes");
            bytes.extend_from_slice(&chunk[..count]);
        }
        bytes.truncate(bytes.len() - END.len());
        bytes
    }
}

/// Commands as clients send them, and such as nobody does.
pub fn commands() -> Vec<Vec<u8>> {
    let words: [&[&[u8]]; 12] = [
        &[b"PING"],
        &[b"GET", b"key"],
        &[b"SET", b"key", b"value"],
        &[b"SET", b"key", b""],
        &[b"SET", b"", b"\0\r\n\xff"],
        &[b"MSET", b"a", b"1", b"b", b"2", b"c", b"3"],
        &[b"SET", b"key", b"*1\r\n$4\r\nPING\r\n"],
        &[b"EVAL", b"return {KEYS[1], ARGV[1]}", b"1", b"key", b"argument"],
        &[b"HELLO", b"3"],
        &[b"XADD", b"stream", b"*", b"field", b"value"],
        &[b"ECHO", &[b'x'; 300]],
        &[b""],
    ];
    let mut commands: Vec<Vec<u8>> = words.iter().map(|words| encode(words)).collect();
    // Pipelines.
    commands.push([encode(&["GET", "a"]), encode(&["GET", "b"])].concat());
    commands.push([encode(&["PING"]), b"*0\r\n".to_vec(), encode(&["PING"])].concat());
    commands.push(b"*-1\r\n*1\r\n$4\r\nPING\r\n".to_vec());
    commands.push(b"*2\r\n$3\r\nGET\r\n:1\r\n".to_vec());
    commands.push(b"*1\r\n*1\r\n$4\r\nPING\r\n".to_vec());
    commands
}
