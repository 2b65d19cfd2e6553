//! Commands to servers and sentinels: few, small, and each with a deadline.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, FromRedisValue, IntoConnectionInfo as _,
    RedisConnectionInfo,
};

/// How long a connection may take to come about, and a command to be answered. Nothing that is asked here takes a server long.
const DEADLINE: Duration = Duration::from_secs(1);

/// A user and its password. `Debug` does not show the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The user.
    pub user: String,
    /// The password.
    pub password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}

/// Why a command brought nothing.
#[derive(Debug, thiserror::Error)]
#[error("{address}: {command}: {source}")]
pub struct AdminError {
    /// Who was asked.
    pub address: SocketAddr,
    /// The command's name.
    pub command: &'static str,
    source: redis::RedisError,
}

/// Where to connect, and as whom.
pub(super) fn connection_info(address: SocketAddr, login: Option<&Login>) -> redis::RedisResult<ConnectionInfo> {
    let mut settings = RedisConnectionInfo::default().set_skip_set_lib_name();
    if let Some(Login { user, password }) = login {
        settings = settings.set_username(user).set_password(password);
    }
    let target = ConnectionAddr::Tcp(address.ip().to_string(), address.port());
    Ok(target.into_connection_info()?.set_redis_settings(settings))
}

impl AdminError {
    /// The code that a refusal begins with, such as `INPROG`; `None` where the command was not answered, or not with an error.
    pub fn code(&self) -> Option<&str> {
        self.source.code()
    }
}

/// A connection to one server or sentinel. It does not reconnect: after an error, open another.
#[derive(Clone)]
pub struct Admin {
    address: SocketAddr,
    connection: MultiplexedConnection,
}

impl Admin {
    /// Connects, and logs in where there is a login.
    pub async fn connect(address: SocketAddr, login: Option<&Login>) -> Result<Self, AdminError> {
        let fail = |source| AdminError { address, command: "connect", source };
        let info = connection_info(address, login).map_err(fail)?;
        let config = AsyncConnectionConfig::new().set_connection_timeout(Some(DEADLINE)).set_response_timeout(Some(DEADLINE));
        let client = Client::open(info).map_err(fail)?;
        let connection = client.get_multiplexed_async_connection_with_config(&config).await.map_err(fail)?;
        Ok(Self { address, connection })
    }

    /// Sends a command of one word with its arguments.
    pub async fn ask<T: FromRedisValue>(&mut self, command: &'static str, arguments: &[&str]) -> Result<T, AdminError> {
        let mut cmd = Cmd::new();
        // A subcommand is an argument of its own: `CLUSTER NODES` is written so for readers.
        command.split(' ').for_each(|word| {
            cmd.arg(word);
        });
        arguments.iter().for_each(|argument| {
            cmd.arg(*argument);
        });
        let address = self.address;
        cmd.query_async(&mut self.connection).await.map_err(|source| AdminError { address, command, source })
    }
}
