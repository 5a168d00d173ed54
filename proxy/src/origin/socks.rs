//! The client's side of SOCKS5 (RFC 1928), with name and password (RFC 1929). The proxy resolves names, as for Go's clients.

use std::io;
use std::net::IpAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const PASSWORD: u8 = 2;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// The reason why a proxy makes no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocksError {
    /// The connection broke off.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Not this protocol.
    #[error("it does not speak SOCKS5")]
    Protocol,
    /// Too long for the protocol.
    #[error("{0} is longer than 255 bytes")]
    TooLong(&'static str),
    /// It wants something else than is given.
    #[error(
        "it takes no connection without a name and a password; write them into the proxy's address"
    )]
    Credentials,
    /// Wrong name or password.
    #[error("it refuses the name and the password")]
    Refused,
    /// It did not connect.
    #[error("{0}")]
    Answered(&'static str),
}

/// Has the proxy at the other end of `stream` connect to `host:port`.
pub(super) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    credentials: Option<(&str, &str)>,
    host: &str,
    port: u16,
) -> Result<(), SocksError> {
    let methods = if credentials.is_some() {
        &[NO_AUTHENTICATION, PASSWORD][..]
    } else {
        &[NO_AUTHENTICATION]
    };
    let mut hello = vec![VERSION, methods.len() as u8];
    hello.extend_from_slice(methods);
    stream.write_all(&hello).await?;
    let mut chosen = [0; 2];
    stream.read_exact(&mut chosen).await?;
    match (chosen, credentials) {
        ([VERSION, NO_AUTHENTICATION], _) => {}
        ([VERSION, PASSWORD], Some((user, password))) => {
            let mut login = vec![1];
            push(&mut login, user.as_bytes(), "its user's name")?;
            push(&mut login, password.as_bytes(), "its user's password")?;
            stream.write_all(&login).await?;
            let mut verdict = [0; 2];
            stream.read_exact(&mut verdict).await?;
            if verdict[1] != 0 {
                return Err(SocksError::Refused);
            }
        }
        ([VERSION, _], _) => return Err(SocksError::Credentials),
        _ => return Err(SocksError::Protocol),
    }
    let mut connect = vec![VERSION, CONNECT, 0];
    match host.parse() {
        Ok(IpAddr::V4(address)) => {
            connect.push(IPV4);
            connect.extend_from_slice(&address.octets());
        }
        Ok(IpAddr::V6(address)) => {
            connect.push(IPV6);
            connect.extend_from_slice(&address.octets());
        }
        Err(_) => {
            connect.push(NAME);
            push(&mut connect, host.as_bytes(), "the host's name")?;
        }
    }
    connect.extend_from_slice(&port.to_be_bytes());
    stream.write_all(&connect).await?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await?;
    let [VERSION, status, _, kind] = answer else {
        return Err(SocksError::Protocol);
    };
    if status != 0 {
        return Err(SocksError::Answered(meaning(status)));
    }
    // The address that the proxy connects from is of no use, and stands before the first byte.
    let rest = match kind {
        IPV4 => 4,
        IPV6 => 16,
        NAME => usize::from(stream.read_u8().await?),
        _ => return Err(SocksError::Protocol),
    };
    stream.read_exact(&mut vec![0; rest + 2]).await?;
    Ok(())
}

/// Adds a text with its length in front.
fn push(message: &mut Vec<u8>, text: &[u8], what: &'static str) -> Result<(), SocksError> {
    message.push(u8::try_from(text.len()).map_err(|_| SocksError::TooLong(what))?);
    message.extend_from_slice(text);
    Ok(())
}

/// RFC 1928, 6.
fn meaning(status: u8) -> &'static str {
    match status {
        2 => "its rules do not allow the connection",
        3 => "the network is unreachable from there",
        4 => "the host is unreachable from there",
        5 => "the host refuses the connection",
        6 => "the host did not answer it in time",
        7 | 8 => "it does not know this kind of connection",
        _ => "it failed",
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    /// Runs the handshake against these answers. The outcome, and the bytes that the client sent.
    async fn run(
        credentials: Option<(&str, &str)>,
        host: &str,
        answers: &[&[u8]],
    ) -> (Result<(), SocksError>, Vec<u8>) {
        let (mut client, mut server) = duplex(1024);
        server.write_all(&answers.concat()).await.unwrap();
        server.write_all(b"payload").await.unwrap();
        let done = greet(&mut client, credentials, host, 443).await;
        if done.is_ok() {
            let mut first = [0; 7];
            client.read_exact(&mut first).await.unwrap();
            assert_eq!(&first, b"payload", "nothing of what follows is swallowed");
        }
        drop(client);
        let mut sent = Vec::new();
        server.read_to_end(&mut sent).await.unwrap();
        (done, sent)
    }

    #[tokio::test]
    async fn names_go_to_the_proxy_and_credentials_only_when_it_asks() {
        let connected: &[u8] = &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        let by_name: &[u8] = &[5, 0, 0, 3, 2, b'a', b'b', 0, 80];
        for (credentials, host, answers, sent) in [
            (
                None,
                "r.io",
                vec![&[5, 0][..], connected],
                b"\x05\x01\x00\x05\x01\x00\x03\x04r.io\x01\xbb".to_vec(),
            ),
            (
                None,
                "10.0.0.1",
                vec![&[5, 0], by_name],
                b"\x05\x01\x00\x05\x01\x00\x01\x0a\x00\x00\x01\x01\xbb".to_vec(),
            ),
            (
                Some(("u", "pw")),
                "r.io",
                vec![&[5, 0], connected],
                b"\x05\x02\x00\x02\x05\x01\x00\x03\x04r.io\x01\xbb".to_vec(),
            ),
            (
                Some(("u", "pw")),
                "r.io",
                vec![&[5, 2], &[1, 0], connected],
                b"\x05\x02\x00\x02\x01\x01u\x02pw\x05\x01\x00\x03\x04r.io\x01\xbb".to_vec(),
            ),
        ] {
            let (done, really_sent) = run(credentials, host, &answers).await;
            assert!(done.is_ok(), "{host} {done:?}");
            assert_eq!(really_sent, sent, "{host}");
        }
    }

    #[tokio::test]
    async fn refusals_say_why() {
        for (credentials, answers, reason) in [
            (None, vec![&b"HTTP/1.1 400"[..]], "it does not speak SOCKS5"),
            (None, vec![&[5, 255][..]], "name and a password"),
            (
                Some(("u", "pw")),
                vec![&[5, 2][..], &[1, 1]],
                "refuses the name",
            ),
            (
                None,
                vec![&[5, 0][..], &[5, 5, 0, 1]],
                "refuses the connection",
            ),
            (
                None,
                vec![&[5, 0][..], &[5, 0, 0, 9]],
                "it does not speak SOCKS5",
            ),
        ] {
            let (done, _) = run(credentials, "r.io", &answers).await;
            let why = done.unwrap_err().to_string();
            assert!(why.contains(reason), "{why}");
            assert!(!why.contains("pw"));
        }
        let (done, _) = run(None, &"a".repeat(256), &[&[5, 0]]).await;
        assert!(matches!(done, Err(SocksError::TooLong(_))));
    }
}
