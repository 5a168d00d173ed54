//! The real capacity of a link: plain TCP both ways at once. The bound is computed from it.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hawker_conformance::lab::Host;

/// Until TCP has found its rate.
const WARM_UP: Duration = Duration::from_secs(1);
const MEASURED: Duration = Duration::from_secs(3);

/// Bytes per second from `a` to `b` and from `b` to `a`, measured at the same time.
pub(crate) fn both_ways(a: &Host, b: &Host) -> Result<[f64; 2]> {
    let (forth, back) = (pair(a, b)?, pair(b, a)?);
    let rates = crate::measure::together([forth, back].map(|pair| move || one_way(pair)))?;
    Ok([rates[0], rates[1]])
}

/// Bytes per second from `a` to `b`, the other direction carrying acknowledgements only.
pub(crate) fn alone(a: &Host, b: &Host) -> Result<f64> {
    one_way(pair(a, b)?)
}

/// In megabits per second, as links are described.
pub(crate) fn mbit(bytes_per_s: f64) -> f64 {
    bytes_per_s * 8.0 / 1e6
}

/// A connection: the end in `from`, then the end in `to`.
fn pair(from: &Host, to: &Host) -> Result<(TcpStream, TcpStream)> {
    let listener = to.enter(|| TcpListener::bind(to.at(0)))??;
    let address = listener.local_addr()?;
    let sender = from.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(5)))??;
    Ok((sender, listener.accept()?.0))
}

fn one_way((mut sender, mut receiver): (TcpStream, TcpStream)) -> Result<f64> {
    receiver.set_read_timeout(Some(Duration::from_secs(5)))?;
    std::thread::scope(|scope| {
        // Its error is the receiver's leaving.
        scope.spawn(move || while sender.write_all(&[0; 64 << 10]).is_ok() {});
        let rate = receive(&mut receiver).context("measuring goodput");
        receiver.shutdown(Shutdown::Both)?;
        drop(receiver);
        rate
    })
}

fn receive(receiver: &mut TcpStream) -> Result<f64> {
    let mut buffer = vec![0; 256 << 10];
    let mut read_for = |time: Duration| -> Result<f64> {
        let (start, mut bytes) = (Instant::now(), 0);
        while start.elapsed() < time {
            bytes += receiver.read(&mut buffer)?;
        }
        Ok(bytes as f64 / start.elapsed().as_secs_f64())
    };
    read_for(WARM_UP)?;
    read_for(MEASURED)
}
