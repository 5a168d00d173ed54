//! A small HTTP client for addresses of this machine: the admin server and the mirror.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

const TIMEOUT: Duration = Duration::from_secs(5);
const BODY_MAX_BYTES: usize = 16 << 20;

/// An answer's status and body.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

/// `GET path` at `address` (`host:port`), within five seconds.
pub(crate) async fn get(address: &str, path: &str) -> anyhow::Result<Answer> {
    let (status, body) = get_bytes(address, path, None, TIMEOUT, BODY_MAX_BYTES).await?;
    Ok(Answer {
        status,
        body: String::from_utf8(body.into()).context("the answer is no text")?,
    })
}

/// `GET path` at `address` within `timeout`: the status, and a body of at most `max_bytes`.
pub(crate) async fn get_bytes(
    address: &str,
    path: &str,
    accept: Option<&'static str>,
    timeout: Duration,
    max_bytes: usize,
) -> anyhow::Result<(u16, Bytes)> {
    match tokio::time::timeout(timeout, get_untimed(address, path, accept, max_bytes)).await {
        Ok(answer) => answer,
        Err(_) => bail!("no answer within {} s", timeout.as_secs()),
    }
}

async fn get_untimed(
    address: &str,
    path: &str,
    accept: Option<&'static str>,
    max_bytes: usize,
) -> anyhow::Result<(u16, Bytes)> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::get(path).header(header::HOST, address);
    if let Some(accept) = accept {
        request = request.header(header::ACCEPT, accept);
    }
    let request = request.body(Empty::<Bytes>::new())?;
    // The connection ends with the request; whichever is first to fail says why.
    let exchange = async move {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), max_bytes)
            .collect()
            .await;
        let body = body
            .map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?
            .to_bytes();
        Ok((status, body))
    };
    tokio::pin!(connection);
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        ended = &mut connection => exchange.await.map_err(|error| ended.map_or_else(Into::into, |()| error)),
    }
}
