//! The lab itself: the properties that the other tests and the benches take for granted.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{
    BlobReads, Containerd, DockerRegistry, End, Families, Host, Image, Lab, Mbit, ObjectStore,
    PrivateCa, RegistryPlan, Request, TokenServer, packaged_image, run,
};

/// Sends `size_bytes` from one host to another; gives the rate in Mbit/s as the receiver sees it.
fn transfer(from: &Host, to: &Host, size_bytes: usize) -> Result<f64> {
    let listener = from.enter(|| TcpListener::bind(from.at(0)))??;
    let address = listener.local_addr()?;
    std::thread::scope(|scope| {
        scope.spawn(move || -> Result<()> {
            Ok(listener.accept()?.0.write_all(&vec![7; size_bytes])?)
        });
        let mut stream =
            to.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(5)))??;
        let start = Instant::now();
        let mut received = Vec::new();
        stream.read_to_end(&mut received)?;
        ensure!(received.len() == size_bytes);
        Ok(size_bytes as f64 * 8.0 / 1e6 / start.elapsed().as_secs_f64())
    })
}

#[test]
fn a_shaped_link_carries_its_rate_and_no_more() -> Result<()> {
    let lab = Lab::new()?;
    let (fast, slow) = (lab.host("fast")?, lab.host("slow")?);
    fast.shape(Mbit(400), Mbit(400))?;
    slow.shape(Mbit(50), Mbit(100))?;
    let before = slow.link_counters()?;
    let (up, down) = (
        transfer(&slow, &fast, 6 << 20)?,
        transfer(&fast, &slow, 12 << 20)?,
    );
    ensure!(
        (42.0..52.0).contains(&up) && (84.0..104.0).contains(&down),
        "up {up}, down {down}"
    );
    let after = slow.link_counters()?;
    ensure!(after.sent_bytes - before.sent_bytes > 6 << 20, "{after:?}");
    ensure!(
        after.received_bytes - before.received_bytes > 12 << 20,
        "{after:?}"
    );
    Ok(())
}

#[test]
fn a_host_behind_nat_reaches_out_and_is_reached_only_at_the_forwarded_port() -> Result<()> {
    let lab = Lab::new()?;
    let (router, outside) = (lab.host("router")?, lab.host("outside")?);
    let inside = lab.host_behind_nat("inside", &router, 1080, 80)?;
    transfer(&outside, &inside, 1 << 20)?;
    let listener = inside.enter(|| TcpListener::bind(inside.at(80)))??;
    let connect = |to: std::net::SocketAddr| {
        outside.enter(|| TcpStream::connect_timeout(&to, Duration::from_millis(500)))
    };
    connect(router.at(1080))??;
    drop(listener.accept()?);
    ensure!(connect(inside.at(80))?.is_err());
    Ok(())
}

#[test]
fn an_ipv6_only_lab_has_no_ipv4_not_even_on_loopback() -> Result<()> {
    let lab = Lab::with_families(Families::Ipv6)?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    transfer(&a, &b, 1 << 20)?;
    ensure!(a.enter(|| TcpListener::bind("127.0.0.1:0"))?.is_err());
    a.enter(|| TcpListener::bind("[::1]:0"))??;
    Ok(())
}

#[test]
fn hosts_of_different_labs_do_not_see_each_other_and_nothing_is_left_behind() -> Result<()> {
    let (one, other) = (Lab::new()?, Lab::new()?);
    let (a, b) = (one.host("a")?, other.host("a")?);
    ensure!(a.ip() == b.ip(), "labs are alike");
    let c = other.host("c")?;
    let listener = c.enter(|| TcpListener::bind(c.at(80)))??;
    ensure!(
        a.enter(|| TcpStream::connect_timeout(&c.at(80), Duration::from_millis(200)))?
            .is_err()
    );
    b.enter(|| TcpStream::connect_timeout(&c.at(80), Duration::from_secs(5)))??;
    drop(listener);

    let (dir, namespace) = (other.dir().to_owned(), c.namespace().to_owned());
    // One that runs inside for long, and some that may not have entered the namespace yet.
    let sleep = || c.command("sleep").arg("20").spawn();
    let mut sleeps = vec![sleep()?];
    std::thread::sleep(Duration::from_millis(100));
    for _ in 0..8 {
        sleeps.push(sleep()?);
    }
    drop(other);
    for mut sleep in sleeps {
        ensure!(!sleep.wait()?.success(), "a process outlived its lab");
    }
    ensure!(!dir.exists() && !std::path::Path::new("/run/netns").join(namespace).exists());
    Ok(())
}

#[test]
fn the_client_tells_a_short_body_from_a_reset_one() -> Result<()> {
    let lab = Lab::new()?;
    let host = lab.host("a")?;
    let end_of = |linger: Option<Duration>| -> Result<End> {
        let listener = host.enter(|| TcpListener::bind(host.at(0)))??;
        let address = listener.local_addr()?;
        let server = std::thread::spawn(move || -> Result<()> {
            let mut stream = listener.accept()?.0;
            let mut request = [0; 4096];
            ensure!(stream.read(&mut request)? > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello")?;
            std::thread::sleep(Duration::from_millis(100));
            rustix::net::sockopt::set_socket_linger(&stream, linger)?;
            Ok(())
        });
        let answer = Request::get(address, "/").send(&host)?;
        server
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))??;
        ensure!(answer.text() == "hello");
        Ok(answer.end)
    };
    ensure!(end_of(None)? == End::Short);
    ensure!(end_of(Some(Duration::ZERO))? == End::Reset);
    Ok(())
}

#[test]
fn containerd_pulls_a_synthetic_image_and_the_registry_tells_what_it_sent() -> Result<()> {
    let lab = Lab::new()?;
    let registry = DockerRegistry::start(&lab.host("origin")?)?;
    let image = Image::noise(1, &[3 << 20, 100_000]);
    let reference = registry.push(&image, "some/where", "one")?;
    ensure!(registry.blob_reads(None) == BlobReads::default());
    let containerd = Containerd::start(&lab.host("node")?, "containerd")?;
    let origin = format!("http://{}", registry.authority());
    containerd.mirrors(&registry.authority(), std::slice::from_ref(&origin), None)?;
    containerd.pull(&reference)?;
    for layer in &image.layers {
        let size = layer.data.len() as u64;
        ensure!(containerd.content_bytes(&layer.digest) == Some(size));
        ensure!(
            registry.blob_reads(Some(&layer.digest))
                == BlobReads {
                    requests: 1,
                    body_bytes: size
                }
        );
    }
    ensure!(
        registry.blob_reads(None).requests == 3,
        "two layers and the configuration"
    );
    Ok(())
}

#[test]
fn a_container_of_an_image_made_from_packages_runs() -> Result<()> {
    let lab = Lab::new()?;
    let registry = DockerRegistry::start(&lab.host("origin")?)?;
    let reference = registry.push_layout(&packaged_image(true)?, "debian/small", "latest")?;
    let containerd = Containerd::start(&lab.host("node")?, "containerd")?;
    containerd.mirrors(
        "_default",
        &[format!("http://{}", registry.authority())],
        None,
    )?;
    containerd.pull(&reference)?;
    let said = containerd
        .run(&reference, &["/bin/sh", "-c", "echo from inside"])
        .context("running it")?;
    ensure!(said.trim() == "from inside", "{said}");
    Ok(())
}

/// Whether skopeo gets an image from a registry as it is, as a user (`name:password`) if there is one.
fn skopeo_gets(host: &Host, reference: &str, user: Option<&str>, flags: &[&str]) -> bool {
    let mut command = host.command("skopeo");
    command
        .args(["--insecure-policy", "copy", "--quiet"])
        .args(flags);
    command.args(user.iter().flat_map(|user| ["--src-creds", user]));
    let target = host.dir().join("copied");
    let copied = run(command
        .arg(format!("docker://{reference}"))
        .arg(format!("dir:{}", target.display())));
    // Content that is there already would not be asked for again.
    let _ = std::fs::remove_dir_all(target);
    copied.is_ok()
}

#[test]
fn docker_registry_believes_the_token_server_and_clients_find_their_way() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let host = lab.host("origin")?;
        let tokens = TokenServer::start(&host)?;
        let registry = RegistryPlan::on(&host).tokens(&tokens).start()?;
        let ann = ("ann", "of: green g&bles");
        tokens.user(ann.0, ann.1);
        tokens.user("bob", "builder");
        tokens.private("ann/app", &["ann"]);
        tokens.private("base", &["ann"]);
        tokens.public("base");
        let image = Image::noise(2, &[50_000]);
        let private = registry.push_as(ann, &image, "ann/app", "v1")?;
        let public = registry.push_as(ann, &image, "base", "v1")?;
        ensure!(
            registry
                .push_as(("bob", "builder"), &image, "base", "v2")
                .is_err(),
            "bob pushed"
        );

        let node = lab.host("node")?;
        let anns = format!("{}:{}", ann.0, ann.1);
        for (reference, user, gets) in [
            (&private, Some(anns.as_str()), true),
            (&private, Some("ann:wrong"), false),
            (&private, Some("bob:builder"), false),
            (&private, None, false),
            (&public, None, true),
        ] {
            let got = skopeo_gets(&node, reference, user, &["--src-tls-verify=false"]);
            ensure!(got == gets, "skopeo got {reference} as {user:?}: {got}");
        }
        let posts = || {
            tokens
                .log()
                .iter()
                .filter(|asked| asked.method == "POST" && asked.status == 200)
                .count()
        };
        ensure!(posts() == 0, "skopeo asks by GET: {:#?}", tokens.log());

        let containerd = Containerd::start(&node, "containerd")?;
        containerd.mirrors(
            "_default",
            &[format!("http://{}", registry.authority())],
            None,
        )?;
        ensure!(
            containerd.fetch_as(("ann", "wrong"), &private).is_err(),
            "containerd got it with a wrong password"
        );
        ensure!(
            containerd.fetch(&private).is_err(),
            "containerd got it without credentials"
        );
        containerd.fetch_as(ann, &private)?;
        ensure!(
            posts() > 0,
            "containerd asks by POST first: {:#?}",
            tokens.log()
        );
        containerd.fetch(&public)?;
        tokens.oauth(false);
        Containerd::start(&node, "other").and_then(|other| {
            other.mirrors(
                "_default",
                &[format!("http://{}", registry.authority())],
                None,
            )?;
            other.fetch_as(ann, &private)
        })
    })())
}

#[test]
fn a_registry_behind_a_private_ca_wants_the_ca_and_the_password() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (ca, host, node) = (
            PrivateCa::new(&lab)?,
            lab.host("origin")?,
            lab.host("node")?,
        );
        let users = [("ann", "gables"), ("bob", "builder")];
        let registry = RegistryPlan::on(&host).basic(&users).tls(&ca)?.start()?;
        let reference = registry.push_as(users[0], &Image::noise(3, &[50_000]), "ann/app", "v1")?;
        let trusting = format!(
            "--src-cert-dir={}",
            ca.certificate().parent().context("its folder")?.display()
        );
        for (user, flags, gets) in [
            (Some("bob:builder"), &[trusting.as_str()][..], true),
            (Some("bob:wrong"), &[trusting.as_str()], false),
            (None, &[trusting.as_str()], false),
            (Some("bob:builder"), &[], false),
        ] {
            ensure!(
                skopeo_gets(&node, &reference, user, flags) == gets,
                "{user:?} {flags:?}"
            );
        }
        Ok(())
    })())
}

#[test]
fn tokens_by_https_are_as_good() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (ca, host, node) = (
            PrivateCa::new(&lab)?,
            lab.host("origin")?,
            lab.host("node")?,
        );
        let tokens = TokenServer::start_tls(&host, &ca.issue(&host)?)?;
        tokens.user("ann", "gables");
        tokens.private("ann/app", &["ann"]);
        let registry = RegistryPlan::on(&host).tokens(&tokens).tls(&ca)?.start()?;
        let reference = registry.push_as(
            ("ann", "gables"),
            &Image::noise(4, &[50_000]),
            "ann/app",
            "v1",
        )?;
        let trusting = format!(
            "--src-cert-dir={}",
            ca.certificate().parent().context("its folder")?.display()
        );
        ensure!(skopeo_gets(
            &node,
            &reference,
            Some("ann:gables"),
            &[&trusting]
        ));
        ensure!(!skopeo_gets(&node, &reference, None, &[&trusting]));
        Ok(())
    })())
}

#[test]
fn a_registry_that_redirects_leaves_the_bytes_to_its_object_store() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (host, elsewhere, node) =
            (lab.host("origin")?, lab.host("objects")?, lab.host("node")?);
        let registry = RegistryPlan::on(&host)
            .basic(&[("ann", "gables")])
            .redirect_to(&elsewhere)
            .start()?;
        let store = ObjectStore::start(&elsewhere, &registry.storage())?;
        let image = Image::noise(5, &[50_000]);
        let reference = registry.push_as(("ann", "gables"), &image, "ann/app", "v1")?;
        ensure!(skopeo_gets(
            &node,
            &reference,
            Some("ann:gables"),
            &["--src-tls-verify=false"]
        ));
        ensure!(
            registry.blob_reads(None) == BlobReads::default(),
            "it sent blobs itself"
        );
        let reads = store.reads();
        let of_layer = reads
            .iter()
            .filter(|read| read.body_bytes == image.size_bytes());
        ensure!(
            of_layer.count() == 1 && reads.iter().all(|read| !read.authorization),
            "{reads:?}"
        );
        Ok(())
    })())
}
