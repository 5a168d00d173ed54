//! nginx as the object store that a registry sends its clients to for blobs.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::host::Host;
use super::process::Process;

const READY: Duration = Duration::from_secs(10);
const PORT: u16 = 8000;

/// A web server that gives whatever lies in a folder to everybody.
#[derive(Debug)]
pub struct ObjectStore {
    host: Host,
    process: Process,
}

/// A request that it answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectRead {
    /// The path asked for.
    pub path: String,
    /// The status answered.
    pub status: u16,
    /// Bytes of the body as sent.
    pub body_bytes: u64,
    /// Whether it came with an `Authorization`, which is none of its business.
    pub authorization: bool,
}

impl ObjectStore {
    /// Starts one on port 8000 of `host`, for what is in `root`.
    ///
    /// # Errors
    /// When it does not come up; the error has the end of its log.
    pub fn start(host: &Host, root: &Path) -> Result<Self> {
        let dir = host.dir().join("objects");
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("nginx.conf"), configuration(host, &dir, root))?;
        let mut command = host.command("nginx");
        command
            .arg("-c")
            .arg(dir.join("nginx.conf"))
            .arg("-p")
            .arg(&dir)
            .args(["-e", "stderr"]);
        let mut process = Process::start(&mut command, host.dir().join("objects.log"))?;
        let address = host.at(PORT);
        let ready = || {
            host.enter(|| TcpStream::connect(address))
                .is_ok_and(|stream| stream.is_ok())
        };
        process.wait_ready(READY, ready).context("nginx")?;
        Ok(Self {
            host: host.clone(),
            process,
        })
    }

    /// `http://host:port`
    #[must_use]
    pub fn base(&self) -> String {
        base(&self.host)
    }

    /// Its answers so far.
    #[must_use]
    pub fn reads(&self) -> Vec<ObjectRead> {
        self.process.log().lines().filter_map(read).collect()
    }
}

/// [`ObjectStore::base`] of the one that will run on `host`.
#[must_use]
pub(super) fn base(host: &Host) -> String {
    format!("http://{}", host.at(PORT))
}

fn configuration(host: &Host, dir: &Path, root: &Path) -> String {
    let (address, dir, root) = (host.at(PORT), dir.display(), root.display());
    format!(
        "daemon off; worker_processes 1; user root; pid {dir}/nginx.pid; error_log stderr;
events {{ worker_connections 256; }}
http {{
    log_format reads 'read $request_uri $status $body_bytes_sent \"$http_authorization\"';
    access_log /dev/stdout reads; default_type application/octet-stream;
    client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3;
    uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
    server {{ listen {address}; root {root}; }}
}}
"
    )
}

/// A line of its log: `read PATH STATUS BYTES "AUTHORIZATION"`
fn read(line: &str) -> Option<ObjectRead> {
    let mut words = line.strip_prefix("read ")?.splitn(4, ' ');
    Some(ObjectRead {
        path: words.next()?.into(),
        status: words.next()?.parse().ok()?,
        body_bytes: words.next()?.parse().ok()?,
        authorization: words.next()? != "\"-\"",
    })
}

#[cfg(test)]
mod tests {
    use super::read;

    #[test]
    fn a_line_tells_what_was_read_and_whether_credentials_came_along() {
        let one = read(r#"read /data?x=1 206 95 "-""#).unwrap();
        assert_eq!(
            (
                one.path.as_str(),
                one.status,
                one.body_bytes,
                one.authorization
            ),
            ("/data?x=1", 206, 95, false)
        );
        assert!(read(r#"read / 404 1 "Bearer a b""#).unwrap().authorization);
        assert!(read("2026/11/25 [error] …").is_none());
    }
}
