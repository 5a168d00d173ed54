use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use super::*;

const SIZE: u64 = 300_000;

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
    /// How the connection ended: `None` by FIN.
    error: Option<io::ErrorKind>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines
            .filter(|(other, _)| other.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
            .next()
    }
}

fn ask(origin: &Origin, method: &str, target: &str, headers: &str) -> Answer {
    let mut stream = TcpStream::connect(origin.address()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: origin:1\r\nConnection: close\r\n{headers}\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut bytes = Vec::new();
    let error = stream
        .read_to_end(&mut bytes)
        .err()
        .map(|error| error.kind());
    let end = bytes
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .map_or(bytes.len(), |at| at + 4);
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head
        .split(' ')
        .nth(1)
        .map_or(0, |word| word.parse().unwrap());
    Answer {
        status,
        head,
        body: bytes[end..].to_vec(),
        error,
    }
}

/// An origin with one blob in repository `a/b`, the blob's path and its bytes.
fn origin() -> (Origin, String, Vec<u8>) {
    let config = OriginConfig {
        control: Some((Ipv4Addr::LOCALHOST, 0).into()),
        ..local()
    };
    let origin = Origin::start(config).unwrap();
    let content = Content::generated(3, SIZE);
    let mut bytes = vec![0; SIZE as usize];
    content.read_at(0, &mut bytes).unwrap();
    let blob = origin.add_blob("a/b", content).unwrap();
    (origin, format!("/v2/a/b/blobs/{}", blob.digest), bytes)
}

fn local() -> OriginConfig {
    OriginConfig::http((Ipv4Addr::LOCALHOST, 0).into())
}

#[test]
fn a_blob_is_served_whole_and_in_ranges_and_the_log_says_so() {
    let (origin, path, bytes) = origin();
    let whole = ask(&origin, "GET", &path, "");
    assert_eq!(
        (whole.status, whole.header("content-length")),
        (200, Some("300000"))
    );
    assert!(whole.body == bytes);
    let head = ask(&origin, "HEAD", &path, "Authorization: Basic eA==\r\n");
    assert_eq!(
        (head.status, head.header("content-length"), head.body.len()),
        (200, Some("300000"), 0)
    );
    for (range, wanted) in [
        ("0-0", 0..1),
        ("299990-", 299_990..300_000),
        ("-5", 299_995..300_000),
        ("5-999999", 5..300_000),
    ] {
        let part = ask(&origin, "GET", &path, &format!("Range: bytes={range}\r\n"));
        assert_eq!(part.status, 206, "{range}");
        assert!(part.body == bytes[wanted], "{range}");
    }
    assert_eq!(
        ask(&origin, "GET", &path, "Range: bytes=300000-\r\n").status,
        416
    );
    assert_eq!(
        ask(&origin, "GET", &path.replace("a/b", "a/c"), "").status,
        404
    );
    let log = origin.log();
    assert_eq!(
        (log[0].body_bytes, log[0].authorization, log[0].status),
        (SIZE, false, 200)
    );
    assert_eq!(
        (
            log[1].body_bytes,
            log[1].authorization,
            log[1].method.as_str()
        ),
        (0, true, "HEAD")
    );
    assert_eq!(log[2].range.as_deref(), Some("bytes=0-0"));
    assert!(origin.totals().blob_bytes > SIZE);
    origin.clear_log();
    assert_eq!(origin.totals(), Totals::default());
}

#[test]
fn an_image_is_found_by_tag_and_by_digest() {
    let (origin, ..) = origin();
    let manifest = origin
        .add_image(
            "lib/x",
            "1",
            &[Content::generated(1, 10), Content::generated(2, 20)],
        )
        .unwrap();
    let by_tag = ask(&origin, "GET", "/v2/lib/x/manifests/1", "");
    assert_eq!(
        by_tag.header("content-type"),
        Some("application/vnd.oci.image.manifest.v1+json")
    );
    assert_eq!(
        by_tag.header("docker-content-digest"),
        Some(manifest.digest.to_string().as_str())
    );
    assert_eq!(
        Content::bytes(by_tag.body.clone()).digest().unwrap(),
        manifest.digest
    );
    let by_digest = ask(
        &origin,
        "GET",
        &format!("/v2/lib/x/manifests/{}", manifest.digest),
        "",
    );
    assert_eq!(by_digest.body, by_tag.body);
    let value: serde_json::Value = serde_json::from_slice(&by_tag.body).unwrap();
    let layer = value["layers"][1]["digest"].as_str().unwrap();
    assert_eq!(
        ask(&origin, "GET", &format!("/v2/lib/x/blobs/{layer}"), "")
            .body
            .len(),
        20
    );
    assert_eq!(ask(&origin, "GET", "/v2/", "").status, 200);
}

#[test]
fn bodies_are_cut_spoilt_and_mislabelled_as_told() {
    let (origin, path, bytes) = origin();
    let with = |fault| {
        origin.clear_faults();
        origin.add_fault(Rule::always(fault).on("/blobs/"));
        ask(&origin, "GET", &path, "Range: bytes=10-\r\n")
    };
    let cut = with(Fault::TruncateAfter { bytes: 1000 });
    assert_eq!(
        (cut.body.len(), cut.error, cut.header("content-length")),
        (1000, None, Some("299990"))
    );
    let reset = with(Fault::ResetAfter { bytes: 1000 });
    assert_eq!(
        (reset.body.len(), reset.error),
        (1000, Some(io::ErrorKind::ConnectionReset))
    );
    let headless = with(Fault::ResetAfter { bytes: 0 });
    assert_eq!(
        (headless.status, headless.error),
        (0, Some(io::ErrorKind::ConnectionReset))
    );
    let long = with(Fault::LieLength { off_by_bytes: 7 });
    assert_eq!(
        (long.body.len(), long.header("content-length")),
        (299_990, Some("299997"))
    );
    let short = with(Fault::LieLength { off_by_bytes: -7 });
    assert_eq!(
        (short.body.len(), short.header("content-length")),
        (299_990, Some("299983"))
    );
    let whole = with(Fault::IgnoreRange);
    assert!(whole.status == 200 && whole.body == bytes);
    let open = with(Fault::NoLength { chunked: false });
    assert!(open.header("content-length").is_none() && open.body == bytes[10..]);
    let chunked = with(Fault::NoLength { chunked: true });
    assert_eq!(chunked.header("transfer-encoding"), Some("chunked"));
    assert!(chunked.body.ends_with(b"\r\n0\r\n\r\n") && chunked.header("content-length").is_none());
    let wrong = with(Fault::WrongBytes {
        offset: 200_000,
        length: 3,
    });
    let differing: Vec<_> = (0..bytes.len() - 10)
        .filter(|at| wrong.body[*at] != bytes[at + 10])
        .collect();
    assert_eq!(differing, [199_990, 199_991, 199_992]);
    assert_eq!(
        ask(&origin, "GET", "/v2/", "").status,
        200,
        "the rule names blobs only"
    );
}

#[test]
fn slow_means_slow() {
    let (origin, path, bytes) = origin();
    origin.add_fault(Rule::always(Fault::SlowHeaders { delay_ms: 200 }));
    origin.add_fault(Rule::always(Fault::SlowBody {
        bytes_per_s: 1_000_000,
    }));
    let start = Instant::now();
    assert!(ask(&origin, "GET", &path, "").body == bytes);
    assert!(
        start.elapsed() >= Duration::from_millis(480),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn refused_and_hanging_connections_come_back_when_the_fault_ends() {
    let (origin, path, bytes) = origin();
    let id = origin.add_fault(Rule::always(Fault::Refuse));
    let deadline = Instant::now() + Duration::from_secs(5);
    while TcpStream::connect(origin.address()).is_ok() {
        assert!(Instant::now() < deadline, "still accepting");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(
        TcpStream::connect(origin.address()).unwrap_err().kind(),
        io::ErrorKind::ConnectionRefused
    );
    origin.remove_fault(id);
    while TcpStream::connect(origin.address()).is_err() {
        assert!(Instant::now() < deadline, "still refusing");
        std::thread::sleep(Duration::from_millis(5));
    }
    origin.add_fault(Rule::always(Fault::Hang).times(1));
    let mut hung = TcpStream::connect(origin.address()).unwrap();
    hung.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes())
        .unwrap();
    hung.set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    assert_eq!(
        hung.read(&mut [0]).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    assert!(ask(&origin, "GET", &path, "").body == bytes);
}

#[test]
fn errors_challenges_and_redirects_are_answered_as_told() {
    let (origin, path, bytes) = origin();
    origin.add_fault(
        Rule::always(Fault::Status {
            code: 429,
            retry_after_s: Some(3),
        })
        .times(1),
    );
    let busy = ask(&origin, "GET", &path, "");
    assert_eq!((busy.status, busy.header("retry-after")), (429, Some("3")));
    assert_eq!(ask(&origin, "GET", &path, "").status, 200);

    let user = "user".to_owned();
    let password = "secret".to_owned();
    let id = origin.add_fault(Rule::always(Fault::Basic {
        user: user.clone(),
        password: password.clone(),
    }));
    assert_eq!(
        ask(&origin, "GET", &path, "").header("www-authenticate"),
        Some(r#"Basic realm="origin""#)
    );
    let basic = "Authorization: Basic dXNlcjpzZWNyZXQ=\r\n";
    assert_eq!(ask(&origin, "GET", &path, basic).status, 200);
    origin.remove_fault(id);

    origin.add_fault(Rule::always(Fault::Bearer {
        anonymous: false,
        user,
        password,
        life_s: None,
    }));
    let challenge = ask(&origin, "GET", &path, "");
    assert_eq!(challenge.status, 401);
    let wanted =
        r#"Bearer realm="http://origin:1/token",service="origin",scope="repository:a/b:pull""#;
    assert_eq!(challenge.header("www-authenticate"), Some(wanted));
    assert_eq!(ask(&origin, "GET", "/token?scope=x", "").status, 401);
    let token: serde_json::Value =
        serde_json::from_slice(&ask(&origin, "GET", "/token?scope=x", basic).body).unwrap();
    let bearer = format!(
        "Authorization: Bearer {}\r\n",
        token["token"].as_str().unwrap()
    );
    assert_eq!(ask(&origin, "GET", &path, &bearer).status, 200);
    origin.clear_faults();

    origin.add_fault(Rule::always(Fault::Redirect {
        status: 307,
        base: String::new(),
        expired: 1,
    }));
    let first = ask(&origin, "GET", &path, "");
    assert_eq!((first.status, first.body.len()), (307, 0));
    assert_eq!(
        ask(&origin, "GET", first.header("location").unwrap(), "").status,
        403
    );
    let second = ask(&origin, "GET", &path, "");
    assert!(ask(&origin, "GET", second.header("location").unwrap(), "").body == bytes);
}

#[test]
fn the_control_port_does_what_the_handle_does() {
    let (origin, ..) = origin();
    let control = |method: &str, path: &str, body: &str| -> serde_json::Value {
        let mut stream = TcpStream::connect(origin.control_address().unwrap()).unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
    };
    let blob = control(
        "POST",
        "/blobs",
        r#"{"repository":"r","seed":9,"size_bytes":4096}"#,
    );
    let path = format!("/v2/r/blobs/{}", blob["digest"].as_str().unwrap());
    assert_eq!(ask(&origin, "GET", &path, "").body.len(), 4096);
    let fault = control("POST", "/faults", r#"{"fault":"status","code":503}"#);
    assert_eq!(ask(&origin, "GET", &path, "").status, 503);
    control("DELETE", &format!("/faults/{}", fault["id"]), "");
    assert_eq!(ask(&origin, "GET", &path, "").status, 200);
    assert_eq!(control("GET", "/totals", "")["blob_gets"], 3);
    assert_eq!(control("GET", "/log", "")[1]["status"], 503);
    let manifest = r#"{"repository":"r","reference":"t","media_type":"text/plain","text":"hello"}"#;
    control("POST", "/manifests", manifest);
    assert_eq!(ask(&origin, "GET", "/v2/r/manifests/t", "").body, b"hello");
    assert!(control("POST", "/faults", "{}")["error"].is_string());
}

#[test]
fn https_is_served_with_the_given_certificate() {
    let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key =
        rustls_pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider));
    let builder = builder
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth();
    let server = builder
        .with_single_cert(vec![signed.cert.der().clone()], key)
        .unwrap();
    let origin = Origin::start(OriginConfig {
        tls: Some(Arc::new(server)),
        ..local()
    })
    .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(signed.cert.der().clone()).unwrap();
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap();
    let config = Arc::new(builder.with_root_certificates(roots).with_no_client_auth());
    let name = "localhost".try_into().unwrap();
    let client = rustls::ClientConnection::new(config, name).unwrap();
    let mut stream =
        rustls::StreamOwned::new(client, TcpStream::connect(origin.address()).unwrap());
    stream.write_all(b"GET /v2/ HTTP/1.1\r\n\r\n").unwrap();
    let mut text = [0; 15];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"HTTP/1.1 200 OK");
}
