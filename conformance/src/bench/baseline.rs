//! The other side of each ratio: nginx serving a file, curl fetching one, openssl hashing it.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{Host, Process};

use crate::measure::finish_with_cpu;

const HTTP_PORT: u16 = 8080;
const HTTPS_PORT: u16 = 8443;

/// nginx with sendfile on a host, by HTTP and by HTTPS (TLS 1.3), serving one file at a time as `/blob`.
pub(crate) struct Nginx {
    process: Process,
    host: Host,
    dir: PathBuf,
}

impl Nginx {
    pub(crate) fn start(host: &Host) -> Result<Self> {
        let dir = host.dir().join("nginx");
        fs::create_dir_all(&dir)?;
        write_certificate(host, &dir)?;
        fs::write(dir.join("nginx.conf"), configuration(&dir))?;
        let mut command = host.command("nginx");
        command
            .arg("-c")
            .arg(dir.join("nginx.conf"))
            .arg("-p")
            .arg(&dir)
            .args(["-e", "stderr"]);
        let mut process = Process::start(&mut command, host.dir().join("nginx.log"))?;
        let address = host.at(HTTPS_PORT);
        process.wait_ready(Duration::from_secs(10), || {
            host.enter(|| TcpStream::connect(address))
                .is_ok_and(|stream| stream.is_ok())
        })?;
        Ok(Self {
            process,
            host: host.clone(),
            dir,
        })
    }

    /// Serves this file from now on.
    pub(crate) fn serve(&self, file: &Path) -> Result<()> {
        let link = self.dir.join("blob");
        if link.is_symlink() {
            fs::remove_file(&link)?;
        }
        symlink(file, &link).context("linking nginx's file")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its HTTP address on its host's loopback.
    pub(crate) fn loopback(&self) -> SocketAddr {
        SocketAddr::new(self.host.loopback(), HTTP_PORT)
    }

    pub(crate) fn http_url(&self) -> String {
        format!("http://{}/blob", self.host.at(HTTP_PORT))
    }

    pub(crate) fn https_url(&self) -> String {
        format!("https://{}/blob", self.host.at(HTTPS_PORT))
    }

    /// The certificate that its clients must trust.
    pub(crate) fn certificate(&self) -> PathBuf {
        self.dir.join("certificate.pem")
    }
}

fn write_certificate(host: &Host, dir: &Path) -> Result<()> {
    let signed = rcgen::generate_simple_self_signed([host.ip().to_string()])?;
    fs::write(dir.join("certificate.pem"), signed.cert.pem())?;
    Ok(fs::write(
        dir.join("key.pem"),
        signed.signing_key.serialize_pem(),
    )?)
}

fn configuration(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "daemon off; worker_processes auto; user root; pid {dir}/nginx.pid; error_log stderr;
events {{ worker_connections 1024; }}
http {{
    access_log off; sendfile on; tcp_nopush on; default_type application/octet-stream;
    client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3;
    uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
    server {{
        listen {HTTP_PORT}; listen {HTTPS_PORT} ssl;
        ssl_protocols TLSv1.3; ssl_certificate {dir}/certificate.pem; ssl_certificate_key {dir}/key.pem;
        location = /blob {{ alias {dir}/blob; }}
    }}
}}
"
    )
}

/// curl's own account of one transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Curled {
    pub(crate) first_byte_ms: f64,
    pub(crate) seconds: f64,
    pub(crate) size_bytes: u64,
    /// CPU seconds of the curl process.
    pub(crate) cpu_s: f64,
}

/// A curl that runs on a host.
pub(crate) struct Curl(Child);

impl Curl {
    /// Starts to fetch `urls`, all at once, each into `output`.
    pub(crate) fn start(
        host: &Host,
        urls: &[String],
        output: &Path,
        trusted: Option<&Path>,
    ) -> Result<Self> {
        let mut command = host.command("curl");
        command.args(["--silent", "--show-error", "--fail", "--no-keepalive"]);
        if urls.len() > 1 {
            command.args(["--parallel", "--parallel-immediate"]);
        }
        command.args([
            "--write-out",
            "%{time_starttransfer} %{time_total} %{size_download}\\n",
        ]);
        if let Some(certificate) = trusted {
            command.arg("--cacert").arg(certificate);
        }
        for url in urls {
            command.arg("--output").arg(output).arg(url);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        child.map(Self).context("starting curl: is it installed?")
    }

    /// Waits for its end: the slowest of its transfers, all bytes.
    pub(crate) fn finish(self) -> Result<Curled> {
        let (output, cpu_s) = finish_with_cpu(self.0)?;
        ensure!(
            output.status.success(),
            "curl failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let mut result = Curled {
            first_byte_ms: 0.0,
            seconds: 0.0,
            size_bytes: 0,
            cpu_s,
        };
        for line in String::from_utf8(output.stdout)?.lines() {
            let words: Vec<f64> = line.split(' ').map(str::parse).collect::<Result<_, _>>()?;
            let [first, total, size] = words[..] else {
                continue;
            };
            result.first_byte_ms = result.first_byte_ms.max(first * 1e3);
            result.seconds = result.seconds.max(total);
            result.size_bytes += size as u64;
        }
        Ok(result)
    }
}

/// Fetches one URL into a file.
pub(crate) fn curl(
    host: &Host,
    url: &str,
    output: &Path,
    trusted: Option<&Path>,
) -> Result<Curled> {
    Curl::start(host, &[url.to_owned()], output, trusted)?.finish()
}

/// CPU seconds of `openssl dgst -sha256`, which must find this digest (hex).
pub(crate) fn openssl_sha256(file: &Path, hex: &str) -> Result<f64> {
    let mut command = std::process::Command::new("openssl");
    command
        .args(["dgst", "-sha256"])
        .arg(file)
        .stdout(Stdio::piped());
    let (output, cpu) = finish_with_cpu(
        command
            .spawn()
            .context("starting openssl: is it installed?")?,
    )?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success() && said.trim().ends_with(hex),
        "openssl found another digest: {said}"
    );
    Ok(cpu)
}
