//! One connection after the other, one request after the other: the answer goes out, slowed, cut or spoilt as the faults say.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use super::answer::{Answer, answer};
use super::fault::Fault;
use super::http::{Connection, head};
use super::log::Mark;
use super::{State, lock};

const CHUNK_BYTES: u64 = 128 << 10;
/// A hanging answer ends when the client does; this only keeps a forgotten one from staying for ever.
const HANG: Duration = Duration::from_secs(600);

/// Accepts for ever; while connections are to be refused there is no listener.
pub(super) async fn serve(mut listener: TcpListener, tls: Option<TlsAcceptor>, state: Arc<State>) {
    let Ok(address) = listener.local_addr() else {
        return;
    };
    let mut refusing = state.refusing.subscribe();
    loop {
        if *refusing.borrow_and_update() {
            drop(listener);
            if refusing.wait_for(|refuse| !*refuse).await.is_err() {
                return;
            }
            listener = rebind(address).await;
        }
        tokio::select! {
            accepted = listener.accept() => if let Ok((tcp, _)) = accepted {
                tokio::spawn(meet(tcp, tls.clone(), Arc::clone(&state)));
            },
            _ = refusing.changed() => {}
        }
    }
}

/// Binds the same port again; somebody may have it for a moment.
async fn rebind(address: SocketAddr) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn meet(tcp: TcpStream, tls: Option<TlsAcceptor>, state: Arc<State>) {
    if let Ok(connection) = Connection::accept(tcp, tls.as_ref()).await {
        converse(connection, &state).await;
    }
}

/// How a connection goes on after an answer.
enum After {
    KeepOpen,
    Close,
    Reset,
}

async fn converse(mut connection: Connection, state: &State) {
    // An error means that the client is gone, or never spoke HTTP: either way the connection ends.
    while let Ok(Some(request)) = connection.request().await {
        let faults = lock(&state.rules).strike(&request.method, request.path());
        let mark = state.log.begin(&request);
        if faults.contains(&Fault::Hang) {
            // A client that gives up is noticed by its FIN, which reads as the end of its requests.
            let _ = tokio::time::timeout(HANG, connection.request()).await;
            return;
        }
        if faults.contains(&Fault::Refuse) {
            return connection.reset().await;
        }
        let answer = answer(state, &request, &faults);
        let sending = Sending {
            state,
            mark,
            faults: &faults,
            answer,
            bodiless: request.method == "HEAD",
        };
        match sending.run(&mut connection).await {
            Ok(After::KeepOpen) if !request.wants_close() => {}
            Ok(After::Reset) => return connection.reset().await,
            _ => return connection.close().await,
        }
    }
}

/// The value of the first fault of a kind that strikes this request.
macro_rules! pick {
    ($sending:expr, $pattern:pat => $value:expr) => {
        $sending.faults.iter().find_map(|fault| {
            if let $pattern = fault {
                Some($value)
            } else {
                None
            }
        })
    };
}

/// An answer under way.
struct Sending<'a> {
    state: &'a State,
    mark: Mark,
    faults: &'a [Fault],
    answer: Answer,
    bodiless: bool,
}

impl Sending<'_> {
    async fn run(mut self, connection: &mut Connection) -> io::Result<After> {
        if let Some(delay_ms) = pick!(self, Fault::SlowHeaders { delay_ms } => *delay_ms) {
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        }
        let reset_after = pick!(self, Fault::ResetAfter { bytes } => *bytes);
        if reset_after == Some(0) {
            return Ok(After::Reset);
        }
        let after = self.write_head(connection).await?;
        if self.bodiless {
            return Ok(After::KeepOpen);
        }
        let truncate_after = pick!(self, Fault::TruncateAfter { bytes } => *bytes);
        let length = self.answer.range.end - self.answer.range.start;
        let limit = length
            .min(reset_after.unwrap_or(length))
            .min(truncate_after.unwrap_or(length));
        let hang_after = pick!(self, Fault::HangAfter { bytes } => *bytes);
        self.write_body(connection, limit.min(hang_after.unwrap_or(limit)))
            .await?;
        if hang_after.is_some_and(|bytes| bytes < limit) {
            tokio::time::sleep(HANG).await;
            return Ok(After::Close);
        }
        Ok(match (limit == length, reset_after, truncate_after) {
            (true, None, None) => after,
            (_, Some(reset), _) if limit == reset => After::Reset,
            (false, ..) => After::Close,
            (true, ..) => after,
        })
    }

    /// Whether the body goes out in chunks.
    fn chunked(&self) -> Option<bool> {
        pick!(self, Fault::NoLength { chunked } => *chunked)
    }

    async fn write_head(&mut self, connection: &mut Connection) -> io::Result<After> {
        let length = self.answer.range.end - self.answer.range.start;
        let lie = pick!(self, Fault::LieLength { off_by_bytes } => *off_by_bytes);
        let mut headers = std::mem::take(&mut self.answer.headers);
        let after = match (self.chunked(), lie) {
            (Some(true), _) => {
                headers.push(("Transfer-Encoding", "chunked".to_owned()));
                After::KeepOpen
            }
            (Some(false), _) => {
                headers.push(("Connection", "close".to_owned()));
                After::Close
            }
            (None, lie) => {
                let off = lie.unwrap_or(0);
                headers.push((
                    "Content-Length",
                    length.saturating_add_signed(off).to_string(),
                ));
                if off > 0 {
                    After::Close
                } else {
                    After::KeepOpen
                }
            }
        };
        self.state.log.status(&self.mark, self.answer.status);
        connection
            .write(&head(self.answer.status, &headers))
            .await?;
        Ok(after)
    }

    async fn write_body(&self, connection: &mut Connection, limit: u64) -> io::Result<()> {
        let rate = pick!(self, Fault::SlowBody { bytes_per_s } => *bytes_per_s);
        let chunked = self.chunked() == Some(true);
        // Twenty steps a second are smooth enough.
        let step = rate.map_or(CHUNK_BYTES, |rate| (rate / 20).clamp(1, CHUNK_BYTES));
        let start = Instant::now();
        let mut buffer = vec![0; usize::try_from(step.min(limit)).unwrap_or(0)];
        let mut sent = 0;
        while sent < limit {
            let length =
                usize::try_from(limit - sent).map_or(buffer.len(), |left| left.min(buffer.len()));
            let chunk = &mut buffer[..length];
            self.answer
                .content
                .read_at(self.answer.range.start + sent, chunk)?;
            self.spoil(self.answer.range.start + sent, chunk);
            if chunked {
                connection
                    .write(format!("{length:x}\r\n").as_bytes())
                    .await?;
            }
            connection.write(chunk).await?;
            if chunked {
                connection.write(b"\r\n").await?;
            }
            self.state.log.sent(&self.mark, length);
            sent += length as u64;
            if let Some(rate) = rate {
                tokio::time::sleep_until(
                    start + Duration::from_secs_f64(sent as f64 / rate.max(1) as f64),
                )
                .await;
            }
        }
        if chunked && limit == self.answer.range.end - self.answer.range.start {
            connection.write(b"0\r\n\r\n").await?;
        }
        Ok(())
    }

    /// Makes the bytes that must be wrong wrong; `offset` is where the chunk lies in the content.
    fn spoil(&self, offset: u64, chunk: &mut [u8]) {
        let end = offset + chunk.len() as u64;
        for fault in self.faults {
            if let Fault::WrongBytes {
                offset: first,
                length,
            } = fault
            {
                for at in (*first).max(offset)..first.saturating_add(*length).min(end) {
                    chunk[(at - offset) as usize] ^= 0xff;
                }
            }
        }
    }
}
