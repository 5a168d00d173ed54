//! The mirror contract's part about who may have what: access comes before bytes, cached or not, whether the registry is up or
//! down, and no credential shows anywhere.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{
    Answer, Cluster, ClusterPlan, Containerd, DockerRegistry, Hawker, HawkerPlan, Image, Lab,
    Layer, Mbit, RegistryPlan, Request, TokenServer, run,
};
use hawker_conformance::origin::{Content, Fault, Rule};
use hawker_conformance::scene::{Plan, REPOSITORY, blob_path, join, right, until, until_committed};
use hawker_oci::digest::{Algorithm, Digest};

const ANN: (&str, &str) = ("ann", "Passw0rd-of-ann");
const BOB: (&str, &str) = ("bob", "Passw0rd-of-bob");
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// After the last request of a client whose token has run out.
const PULL_GRACE: Duration = Duration::from_secs(2);

/// Two tenants at one registry, each with a repository of its own: the two images share a layer, and have one each of their own.
struct Tenants {
    cluster: Cluster,
    tokens: TokenServer,
    registry: DockerRegistry,
    shared: Layer,
    anns: Layer,
    bobs: Layer,
    references: [String; 2],
    lab: Lab,
}

fn tenants(
    nodes: usize,
    flags: &[&str],
    play: impl FnOnce(&mut Tenants) -> Result<()>,
) -> Result<()> {
    let lab = Lab::new()?;
    let host = lab.host("origin")?;
    let tokens = TokenServer::start(&host)?;
    for (name, password) in [ANN, BOB] {
        tokens.user(name, password);
        tokens.private(&format!("{name}/app"), &[name]);
    }
    tokens.private("base", &["ann"]);
    tokens.public("base");
    let registry = RegistryPlan::on(&host).tokens(&tokens).start()?;
    let [shared, anns, bobs] =
        [(51, 700_000), (52, 300_000), (53, 400_000)].map(|(seed, size)| Layer::noise(seed, size));
    let image = |own: &Layer| Image {
        layers: vec![shared.clone(), own.clone()],
    };
    let references = [
        registry.push_as(ANN, &image(&anns), "ann/app", "v1")?,
        registry.push_as(BOB, &image(&bobs), "bob/app", "v1")?,
    ];
    registry.push_as(ANN, &Image::noise(54, &[100_000]), "base", "v1")?;
    let plan = ClusterPlan {
        nodes,
        plain_registries: vec![registry.authority()],
        args: flags.iter().map(|&flag| flag.to_owned()).collect(),
        ..ClusterPlan::default()
    };
    let cluster = lab.explain(Cluster::start(&lab, &plan))?;
    tokens.clear_log();
    let mut scene = Tenants {
        cluster,
        tokens,
        registry,
        shared,
        anns,
        bobs,
        references,
        lab,
    };
    let outcome = play(&mut scene);
    scene.lab.explain(outcome)
}

impl Tenants {
    /// Asks a node's mirror for something of a repository, with this `Authorization` if there is one.
    fn ask(&self, node: &Hawker, path: &str, authorization: Option<&str>) -> Result<Answer> {
        let request = node
            .request(self.registry.authority(), path)
            .within(Duration::from_secs(20));
        let request = request.header("accept", MANIFEST);
        let request = authorization.iter().fold(request, |request, value| {
            request.header("authorization", *value)
        });
        request.send(node.host())
    }

    /// An `Authorization` by a fresh token of a user's, for pulling from a repository: good for nothing where the user may not.
    fn bearer(&self, user: Option<(&str, &str)>, repository: &str) -> String {
        format!(
            "Bearer {}",
            self.tokens.token(user.map(|(name, _)| name), repository)
        )
    }

    /// A containerd beside a node, whose only mirror is that node.
    fn containerd(&self, node: &Hawker, name: &str) -> Result<Containerd> {
        let containerd = Containerd::start_for_kubelet(node.host(), name)?;
        containerd.mirrors("_default", &[format!("http://{}", node.mirror())], None)?;
        Ok(containerd)
    }

    fn layers(&self) -> [&Layer; 3] {
        [&self.shared, &self.anns, &self.bobs]
    }
}

fn blob(repository: &str, layer: &Layer) -> String {
    format!("/v2/{repository}/blobs/{}", layer.digest)
}

fn is_cached(node: &Hawker, layer: &Layer) -> bool {
    let hex = layer.digest.trim_start_matches("sha256:");
    node.store_dir()
        .join("blobs/sha256")
        .join(&hex[..2])
        .join(hex)
        .is_file()
}

/// Checks that an answer refuses, and has nothing of the layer in it.
fn denied(what: &str, answer: &Answer, statuses: &[u16]) -> Result<()> {
    ensure!(
        statuses.contains(&answer.status),
        "{what}: {} is not one of {statuses:?}",
        answer.status
    );
    ensure!(
        answer.body_bytes < 2000,
        "{what}: {} bytes",
        answer.body_bytes
    );
    Ok(())
}

/// The callers, the content they ask for, and the right answers, on a node that may have all or nothing of it.
fn matrix(scene: &Tenants, node: &Hawker, round: &str) -> Result<()> {
    let anns = scene.bearer(Some(ANN), "ann/app");
    let bobs = scene.bearer(Some(BOB), "bob/app");
    let [ann_at_bobs, nobody_at_anns] = [
        scene.bearer(Some(ANN), "bob/app"),
        scene.bearer(None, "ann/app"),
    ];
    // Not the last letter of the signature: most of its bits are padding, which nobody looks at.
    let (head, tail) = anns.split_at(anns.len() - 20);
    let forged = format!(
        "{head}{}{}",
        if tail.starts_with('A') { 'B' } else { 'A' },
        &tail[1..]
    );
    let [shared, own_of_ann, own_of_bob] = scene.layers();
    let nobodys: [Option<&str>; 7] = [
        None,
        Some(&nobody_at_anns),
        Some(&forged),
        Some("Bearer nonsense"),
        Some("Basic YW5uOndyb25n"),
        Some("Negotiate x"),
        Some(""),
    ];
    for (repository, owner, strangers, own, others) in [
        (
            "ann/app",
            &anns,
            [&bobs, &nobody_at_anns],
            own_of_ann,
            own_of_bob,
        ),
        (
            "bob/app",
            &bobs,
            [&anns, &ann_at_bobs],
            own_of_bob,
            own_of_ann,
        ),
    ] {
        let strangers_are_denied = |path: &str| {
            let mut all = strangers
                .into_iter()
                .map(|token| Some(token.as_str()))
                .chain(nobodys);
            all.try_for_each(|stranger| {
                let answer = scene.ask(node, path, stranger)?;
                denied(
                    &format!("{round}: a stranger at {path}"),
                    &answer,
                    &[400, 401, 403],
                )
            })
        };
        for layer in [shared, own] {
            let path = blob(repository, layer);
            let answer = scene.ask(node, &path, Some(owner))?;
            ensure!(
                answer.status == 200 && answer.body == layer.data,
                "{round}: the owner at {path}: {}",
                answer.status
            );
            strangers_are_denied(&path)?;
            let part = node
                .request(scene.registry.authority(), &path)
                .header("range", "bytes=0-9")
                .send(node.host())?;
            denied(&format!("{round}: a range of {path}"), &part, &[401])?;
            let challenge = part.header("www-authenticate").context("no challenge")?;
            ensure!(
                challenge.contains(&format!("realm=\"{}\"", scene.tokens.realm())),
                "{challenge}"
            );
            ensure!(
                challenge.contains(&format!("scope=\"repository:{repository}:pull\"")),
                "{challenge}"
            );
            // Other spellings of the same place.
            let registry = scene.registry.authority();
            for target in [
                format!("/v2/{registry}{}", path.trim_start_matches("/v2")),
                format!("/{registry}{path}"),
                format!("/{registry}{path}?ns=elsewhere.test"),
                format!("{path}?ns={registry}").replace("sha256:", "sha256%3A"),
            ] {
                let answer = Request::get(node.mirror(), &target).send(node.host())?;
                denied(&format!("{round}: nobody at {target}"), &answer, &[401])?;
            }
        }
        // The content of another tenant counts as missing, though it is on this very node.
        let elsewhere = blob(repository, others);
        denied(
            &format!("{round}: {elsewhere}"),
            &scene.ask(node, &elsewhere, Some(owner))?,
            &[404],
        )?;
        for reference in ["v1".to_owned(), scene.manifest_of(repository)?] {
            let path = format!("/v2/{repository}/manifests/{reference}");
            ensure!(
                scene.ask(node, &path, Some(owner))?.status == 200,
                "{round}: the owner at {path}"
            );
            strangers_are_denied(&path)?;
        }
        let others = if repository == "ann/app" {
            "bob/app"
        } else {
            "ann/app"
        };
        let foreign = format!("/v2/{repository}/manifests/{}", scene.manifest_of(others)?);
        denied(
            &format!("{round}: {foreign}"),
            &scene.ask(node, &foreign, Some(owner))?,
            &[404],
        )?;
    }
    Ok(())
}

impl Tenants {
    /// The digest of a repository's `v1`, as the registry itself says.
    fn manifest_of(&self, repository: &str) -> Result<String> {
        let owner = if repository == "ann/app" { ANN } else { BOB };
        let path = format!("/v2/{repository}/manifests/v1");
        let request = Request::new("HEAD", self.registry.authority().parse()?, path)
            .header("accept", MANIFEST)
            .header("authorization", self.bearer(Some(owner), repository));
        let answer = request.send(self.registry.host())?;
        Ok(answer
            .header("docker-content-digest")
            .context("no digest")?
            .to_owned())
    }
}

#[test]
fn each_tenant_reads_its_own_and_what_is_shared_through_its_own_repository_and_nothing_else()
-> Result<()> {
    tenants(2, &["--log-level", "trace"], |scene| {
        let nodes = &scene.cluster.nodes;
        let [anns, bobs] = &scene.references;
        let [one, other] = [
            scene.containerd(&nodes[0], "one")?,
            scene.containerd(&nodes[0], "other")?,
        ];
        one.fetch_as(ANN, anns)?;
        other.pull_as_kubelet(bobs, Some(BOB))?;
        until(Duration::from_secs(10), "all layers to be cached", || {
            Ok(scene
                .layers()
                .iter()
                .all(|layer| is_cached(&nodes[0], layer)))
        })?;
        for (containerd, user, reference) in [
            (&one, ANN, bobs),
            (&one, (ANN.0, "wrong"), anns),
            (&other, BOB, anns),
        ] {
            ensure!(
                containerd.fetch_as(user, reference).is_err(),
                "{} fetched {reference}",
                user.0
            );
            ensure!(
                containerd.pull_as_kubelet(reference, Some(user)).is_err(),
                "{} pulled {reference}",
                user.0
            );
        }
        ensure!(
            scene.containerd(&nodes[0], "third")?.fetch(anns).is_err(),
            "nobody fetched {anns}"
        );
        matrix(scene, &nodes[0], "cached here")?;
        // The other node has nothing yet: its bytes come from the seed and from the first one.
        matrix(scene, &nodes[1], "cached elsewhere")?;
        scene.containerd(&nodes[1], "fourth")?.fetch_as(BOB, bobs)?;
        nothing_shows(scene)
    })
}

/// Checks that no password and no token is in a log, on a status page, on a command line, or on a disk.
fn nothing_shows(scene: &Tenants) -> Result<()> {
    // All tokens begin alike; a password's Basic form is searched for as well.
    let token = scene.tokens.token(None, "x");
    let jwt = token.get(..24).context("a token is long")?;
    let secrets = [
        ANN.1,
        BOB.1,
        "Passw0rd",
        jwt,
        "YW5uOlBhc3N3MHJk",
        "Ym9iOlBhc3N3MHJk",
        "YW5uOndyb25n",
    ];
    for member in scene.cluster.nodes.iter().chain([&scene.cluster.seed]) {
        let name = member.host().name();
        let pid = member.pid().context("it runs")?;
        let mut places = vec![("its log", member.log())];
        for path in ["/status", "/metrics", "/readyz", "/healthy"] {
            places.push((path, member.admin_get(path)?.text()));
        }
        places.push((
            "its command line",
            std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?,
        ));
        ensure!(
            places[0].1.contains("TRACE"),
            "{name} logs too little for this to mean anything"
        );
        for secret in secrets {
            for (place, text) in &places {
                let line = text.lines().find(|line| line.contains(secret));
                ensure!(
                    line.is_none(),
                    "{secret:?} of {name} shows in {place}: {line:?}"
                );
            }
            ensure!(
                !is_below(member.data_dir(), secret)?,
                "{secret:?} is on {name}'s disk"
            );
        }
    }
    Ok(())
}

/// Whether a file below `dir` has these bytes in it.
fn is_below(dir: &Path, text: &str) -> Result<bool> {
    let found = std::process::Command::new("grep")
        .args(["-rqaF", "-e", text])
        .arg(dir)
        .status()?;
    ensure!(found.code().is_some_and(|code| code < 2), "grep failed");
    Ok(found.success())
}

#[test]
fn while_the_registry_is_down_its_last_word_counts_as_long_as_the_token_lives_and_no_longer()
-> Result<()> {
    tenants(1, &["--pull-grace", "2s"], |scene| {
        let node = &scene.cluster.nodes[0];
        let life = Duration::from_secs(6);
        scene.tokens.life(life);
        let (anns, bobs) = (
            scene.bearer(Some(ANN), "ann/app"),
            scene.bearer(Some(BOB), "bob/app"),
        );
        let unused = scene.bearer(Some(ANN), "ann/app");
        let given = Instant::now();
        let [shared, own_of_ann, own_of_bob] = scene.layers().map(Clone::clone);
        let owned = [
            ("ann/app", &anns, &shared),
            ("ann/app", &anns, &own_of_ann),
            ("bob/app", &bobs, &shared),
            ("bob/app", &bobs, &own_of_bob),
        ];
        for (repository, token, layer) in owned {
            let answer = scene.ask(node, &blob(repository, layer), Some(token))?;
            ensure!(
                answer.status == 200 && answer.body == layer.data,
                "{repository}: {}",
                answer.status
            );
        }
        until(Duration::from_secs(10), "all layers to be cached", || {
            Ok(scene.layers().iter().all(|layer| is_cached(node, layer)))
        })?;
        scene.registry.kill()?;
        let node = &scene.cluster.nodes[0];
        for (repository, token, layer) in owned {
            let answer = scene.ask(node, &blob(repository, layer), Some(token))?;
            ensure!(
                answer.status == 200 && answer.body == layer.data,
                "down, {repository}: {}",
                answer.status
            );
        }
        ensure!(
            given.elapsed() < life,
            "too slow a machine for this test: {:?}",
            given.elapsed()
        );
        let errors: Vec<u16> = (400..600).collect();
        let refused = |what: &str, repository: &str, token: Option<&str>| -> Result<()> {
            for layer in scene.layers() {
                let start = Instant::now();
                let answer = scene.ask(node, &blob(repository, layer), token)?;
                denied(&format!("down, {what} at {repository}"), &answer, &errors)?;
                ensure!(
                    start.elapsed() < Duration::from_secs(10),
                    "{what} waited {:?}",
                    start.elapsed()
                );
            }
            Ok(())
        };
        refused("nobody", "ann/app", None)?;
        refused("bob", "ann/app", Some(&bobs))?;
        refused("ann", "bob/app", Some(&anns))?;
        refused("a token never seen before", "ann/app", Some(&unused))?;
        for (repository, token, others) in [
            ("ann/app", &anns, &own_of_bob),
            ("bob/app", &bobs, &own_of_ann),
        ] {
            let answer = scene.ask(node, &blob(repository, others), Some(token))?;
            denied(
                &format!("down, another's at {repository}"),
                &answer,
                &errors,
            )?;
        }
        std::thread::sleep(
            (life + PULL_GRACE + Duration::from_millis(1500)).saturating_sub(given.elapsed()),
        );
        refused("ann, whose token has run out,", "ann/app", Some(&anns))?;
        refused("bob, whose token has run out,", "bob/app", Some(&bobs))?;
        scene.registry.restart()?;
        let node = &scene.cluster.nodes[0];
        let anew = scene.bearer(Some(ANN), "ann/app");
        until(
            Duration::from_secs(20),
            "the registry to be asked again",
            || {
                Ok(scene
                    .ask(node, &blob("ann/app", &scene.anns), Some(&anew))?
                    .status
                    == 200)
            },
        )
    })
}

#[test]
fn what_a_user_may_no_longer_have_is_denied_though_it_is_cached() -> Result<()> {
    tenants(1, &[], |scene| {
        let node = &scene.cluster.nodes[0];
        let path = blob("ann/app", &scene.anns);
        let before = scene.bearer(Some(ANN), "ann/app");
        ensure!(scene.ask(node, &path, Some(&before))?.status == 200);
        scene.tokens.private("ann/app", &[]);
        let after = scene.bearer(Some(ANN), "ann/app");
        denied(
            "after it was taken away",
            &scene.ask(node, &path, Some(&after))?,
            &[401, 403],
        )?;
        let containerd = scene.containerd(node, "containerd")?;
        ensure!(containerd.fetch_as(ANN, &scene.references[0]).is_err());
        // Public content is for everybody.
        containerd.fetch(&format!("{}/base:v1", scene.registry.authority()))?;
        scene.tokens.oauth(false);
        scene
            .containerd(node, "other")?
            .fetch_as(BOB, &scene.references[1])
    })
}

#[test]
fn a_private_image_costs_the_registry_one_copy_for_many_nodes() -> Result<()> {
    for lent in ["true", "false"] {
        tenants(3, &["--seed-uses-client-token", lent], |scene| {
            let runtimes = scene
                .cluster
                .nodes
                .iter()
                .map(|node| scene.containerd(node, "containerd"));
            let runtimes = runtimes.collect::<Result<Vec<_>>>()?;
            std::thread::scope(|scope| {
                let pulls: Vec<_> = runtimes
                    .iter()
                    .map(|runtime| scope.spawn(|| runtime.fetch_as(ANN, &scene.references[0])))
                    .collect();
                pulls.into_iter().try_for_each(|pull| join(pull.join()))
            })?;
            for layer in [&scene.shared, &scene.anns] {
                let reads = scene.registry.blob_reads(Some(&layer.digest));
                ensure!(
                    reads.body_bytes == layer.data.len() as u64,
                    "lent {lent}: {} was sent in {reads:?}",
                    layer.digest
                );
            }
            let seed_read = scene.cluster.seed.status()?.bytes.received_origin;
            let expected = lent == "true";
            ensure!(
                (seed_read >= scene.shared.data.len() as u64) == expected,
                "lent {lent}: the seed read {seed_read}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_password_goes_to_its_registry_alone_and_one_of_those_who_have_it_fetches_for_all() -> Result<()>
{
    let lab = Lab::new()?;
    lab.explain((|| {
        let registry = RegistryPlan::on(&lab.host("origin")?)
            .basic(&[ANN, BOB])
            .start()?;
        let image = Image::noise(55, &[900_000, 50_000]);
        let reference = registry.push_as(ANN, &image, "ann/app", "v1")?;
        let plan = ClusterPlan {
            nodes: 2,
            plain_registries: vec![registry.authority()],
            ..ClusterPlan::default()
        };
        let cluster = Cluster::start(&lab, &plan)?;
        let runtimes = cluster.nodes.iter().map(|node| {
            let containerd = Containerd::start(node.host(), "containerd")?;
            containerd.mirrors("_default", &[format!("http://{}", node.mirror())], None)?;
            Ok(containerd)
        });
        let runtimes = runtimes.collect::<Result<Vec<_>>>()?;
        for wrong in [(ANN.0, "wrong"), ("eve", ANN.1)] {
            ensure!(
                runtimes[0].fetch_as(wrong, &reference).is_err(),
                "{wrong:?}, not cached"
            );
        }
        runtimes[0].fetch_as(ANN, &reference)?;
        runtimes[1].fetch_as(BOB, &reference)?;
        let anew = Containerd::start(cluster.nodes[0].host(), "other")?;
        anew.mirrors(
            "_default",
            &[format!("http://{}", cluster.nodes[0].mirror())],
            None,
        )?;
        for wrong in [(ANN.0, "wrong"), ("eve", ANN.1)] {
            ensure!(
                anew.fetch_as(wrong, &reference).is_err(),
                "{wrong:?}, cached"
            );
        }
        ensure!(
            anew.fetch(&reference).is_err(),
            "without credentials, cached"
        );
        for layer in &image.layers {
            let reads = registry.blob_reads(Some(&layer.digest));
            ensure!(
                reads.body_bytes == layer.data.len() as u64,
                "{} was sent in {reads:?}",
                layer.digest
            );
        }
        ensure!(
            cluster.seed.status()?.bytes.received_origin == 0,
            "a password was lent to the seed"
        );
        for member in cluster.nodes.iter().chain([&cluster.seed]) {
            for secret in [ANN.1, BOB.1, "YW5uOlBhc3N3MHJk", "Ym9iOlBhc3N3MHJk"] {
                ensure!(
                    !member.log().contains(secret),
                    "{secret:?} is in the log of {}",
                    member.host().name()
                );
                ensure!(
                    !is_below(member.data_dir(), secret)?,
                    "{secret:?} is on the disk of {}",
                    member.host().name()
                );
            }
        }
        Ok(())
    })())
}

#[test]
fn a_pull_outlives_its_token_and_no_other_does() -> Result<()> {
    let life = Duration::from_secs(3);
    Plan::nodes(1)
        .link(Mbit(20))
        .flag("--pull-grace", "2s")
        .play(|scene| {
            let bearer = |life_s| Fault::Bearer {
                anonymous: false,
                user: ANN.0.into(),
                password: ANN.1.into(),
                life_s: Some(life_s),
            };
            scene.origin.add_fault(Rule::always(bearer(life.as_secs())));
            let blob = scene.blob(14 << 20)?;
            let node = scene.node();
            let token = || -> Result<String> {
                use base64::Engine as _;
                let basic = base64::engine::general_purpose::STANDARD
                    .encode(format!("{}:{}", ANN.0, ANN.1));
                let request = Request::get(scene.origin.address(), "/token")
                    .header("authorization", format!("Basic {basic}"));
                let answer: serde_json::Value =
                    serde_json::from_str(&request.send(node.host())?.text())?;
                Ok(format!(
                    "Bearer {}",
                    answer["token"].as_str().context("no token")?
                ))
            };
            let given = Instant::now();
            let mine = token()?;
            let ask = |authorization: &str| {
                scene
                    .request(node, &blob)
                    .header("authorization", authorization)
                    .send(node.host())
            };
            right(ask(&mine)?, &blob)?;
            ensure!(
                given.elapsed() > life,
                "it was over before the token was: {:?}",
                given.elapsed()
            );
            until_committed(node, &blob)?;
            // It read no manifest that names the blob: its token was all it had.
            ensure!(ask(&mine)?.status == 401, "it lives on");
            right(ask(&token()?)?, &blob)?;

            // The blobs of a manifest that it read in time come after that, each once and while bytes go out.
            let few = [70, 71, 72].map(|seed| Content::generated(seed, 1 << 20));
            let layers = few
                .iter()
                .map(|content| scene.origin.add_blob(REPOSITORY, content.clone()));
            let layers = layers.collect::<std::io::Result<Vec<_>>>()?;
            scene.origin.add_image(REPOSITORY, "few", &few)?;
            // The node has them already: at the registry a token that has run out opens nothing.
            let earlier = token()?;
            for layer in &layers {
                let request = scene.request(node, layer).header("authorization", &earlier);
                right(request.send(node.host())?, layer)?;
                until_committed(node, layer)?;
            }
            // Tokens of one second may be alike.
            std::thread::sleep(Duration::from_millis(1100));
            let mine = token()?;
            let given = Instant::now();
            let get = |path: &str| {
                node.request(scene.registry(), path)
                    .header("authorization", &mine)
                    .send(node.host())
            };
            ensure!(get(&format!("/v2/{REPOSITORY}/manifests/few"))?.status == 200);
            until(
                life + Duration::from_secs(2),
                "the end of the token's life",
                || {
                    get(&blob_path(&layers[0]))?;
                    Ok(given.elapsed() > life)
                },
            )?;
            ensure!(
                get(&blob_path(&layers[0]))?.status == 401,
                "it went out whole"
            );
            ensure!(
                get(&blob_path(&layers[1]))?.status == 200,
                "it is of the same manifest"
            );
            std::thread::sleep(Duration::from_millis(100));
            ensure!(
                get(&blob_path(&layers[1]))?.status == 401,
                "it went out whole"
            );
            ensure!(
                get(&format!("/v2/{REPOSITORY}/manifests/few"))?.status == 401,
                "no manifest"
            );
            std::thread::sleep(PULL_GRACE + Duration::from_secs(1));
            ensure!(
                get(&blob_path(&layers[2]))?.status == 401,
                "no byte went out for longer than the grace"
            );

            // containerd gets no new token in mid-pull: all of an image that takes longer than its token lives.
            let layers = [60, 61, 62].map(|seed| Content::generated(seed, 5 << 20));
            scene.origin.add_image(REPOSITORY, "v1", &layers)?;
            let containerd = Containerd::start(node.host(), "containerd")?;
            containerd.mirrors("_default", &[format!("http://{}", node.mirror())], None)?;
            let start = Instant::now();
            containerd.fetch_as(ANN, &format!("{}/{REPOSITORY}:v1", scene.registry()))?;
            ensure!(
                start.elapsed() > life,
                "it was over before the token was: {:?}",
                start.elapsed()
            );
            Ok(())
        })
}

/// A user that may push to a repository writes its manifests: they may name blobs that the user could not read.
#[test]
fn a_manifest_that_names_anothers_digest_gives_nobody_what_it_stands_for() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let layer = Content::generated(71, 900_000);
        let secret = scene.origin.add_blob(REPOSITORY, layer.clone())?.digest;
        let victim = scene.origin.add_image(REPOSITORY, "v1", &[layer])?.digest;
        let nowhere = format!("http://{}/gone", scene.origin.address());
        let descriptor = serde_json::json!({ "digest": secret.to_string(), "size": 900_000 });
        let mut with_urls = descriptor.clone();
        with_urls["urls"] = serde_json::json!([nowhere]);
        let index = "application/vnd.oci.image.index.v1+json";
        let of_victim = serde_json::json!([{ "digest": victim.to_string(), "mediaType": MANIFEST }]);
        // zot looks at none of these.
        let odd = |media_type: &str| {
            let mut odd = descriptor.clone();
            odd["mediaType"] = media_type.into();
            odd
        };
        let artifact =
            [odd("application/vnd.example.config"), odd("application/vnd.oci.image.layer.v1.tar+gzip")];
        let hidden = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
        let mut config = odd("application/vnd.oci.image.config.v1+json");
        config["digest"] =
            scene.origin.add_blob("mallory/app", Content::bytes(*b"{}"))?.digest.to_string().into();
        let [artifact, image] = [artifact, [config, odd(hidden)]].map(
            |[config, layer]| serde_json::json!({ "schemaVersion": 2, "config": config, "layers": [layer] }),
        );
        let bait = [
            (MANIFEST, artifact),
            (MANIFEST, image),
            (MANIFEST, serde_json::json!({ "schemaVersion": 2, "layers": [with_urls] })),
            (index, serde_json::json!({ "schemaVersion": 2, "manifests": of_victim })),
            (index, serde_json::json!({ "schemaVersion": 2, "mediaType": index, "layers": [descriptor] })),
            (MANIFEST, serde_json::json!({ "layers": [descriptor], "manifests": of_victim })),
        ];
        let bait = bait.map(|(media_type, text)| {
            scene.origin.add_manifest("mallory/app", "bait", media_type, text.to_string().as_bytes()).digest
        });
        let paths = |repository: &str| {
            [format!("/v2/{repository}/blobs/{secret}"), format!("/v2/{repository}/manifests/{victim}")]
        };
        let ask = |node: &Hawker, method: &str, path: &str| {
            let target = format!("{path}?ns={}", scene.registry());
            Request::new(method, node.mirror(), target).within(Duration::from_secs(20)).send(node.host())
        };
        let [cached, empty] = [&scene.cluster.nodes[0], &scene.cluster.nodes[1]];
        for path in paths(REPOSITORY) {
            ensure!(ask(cached, "GET", &path)?.status == 200);
        }
        // One node has it all, the other would get it from the first one and from the seed.
        for node in [cached, empty] {
            for (i, digest) in bait.into_iter().enumerate() {
                let answer = ask(node, "GET", &format!("/v2/mallory/app/manifests/{digest}"))?;
                ensure!(answer.status == 200, "the bait: {}", answer.status);
                for path in paths("mallory/app") {
                    for method in ["HEAD", "GET", "GET"] {
                        let answer = ask(node, method, &path)?;
                        let harmless = method == "HEAD" && answer.status == 200 && path.contains("/blobs/");
                        ensure!(
                            harmless || answer.status == 404,
                            "bait {i}: {method} {path}: {}",
                            answer.status
                        );
                        ensure!(answer.body_bytes < 2000, "bait {i}: {method} {path}: all of it");
                    }
                }
            }
        }
        scene.origin.add_fault(Rule::always(Fault::Refuse));
        for path in paths("mallory/app") {
            let answer = ask(cached, "GET", &path)?;
            denied(&format!("down, {path}"), &answer, &[404, 502, 503, 504])?;
        }
        ensure!(ask(cached, "GET", &paths(REPOSITORY)[0])?.status == 200, "its own repository has it");
        Ok(())
    })
}

/// The registry judges the meaning of a pushed document, and may read it otherwise than we do.
#[test]
fn no_document_that_a_real_registry_takes_gives_what_the_registry_does_not() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let host = lab.host("origin")?;
        let registry = DockerRegistry::start(&host)?;
        let (theirs, ours) = (Layer::noise(81, 300_000), Layer::noise(82, 10_000));
        registry.push(&Image { layers: vec![theirs.clone()] }, "victim/app", "v1")?;
        registry.push(&Image { layers: vec![ours.clone()] }, "mallory/app", "v1")?;
        let node = HawkerPlan::proxy(&lab.host("node")?).plain_registry(registry.authority()).start()?;
        let index = "application/vnd.oci.image.index.v1+json";
        let docker = "application/vnd.docker.distribution.manifest.v2+json";
        let ask = |method: &str, path: &str| {
            let target = format!("{path}?ns={}", registry.authority());
            let accept = format!("{MANIFEST}, {docker}, {index}");
            Request::new(method, node.mirror(), target).header("accept", accept).send(node.host())
        };
        let whole = ask("GET", &blob("victim/app", &theirs))?;
        ensure!(whole.status == 200 && whole.body == theirs.data);
        let descriptor = |layer: &Layer| {
            format!(
                "{{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",\"digest\":\"{}\",\"size\":{}}}",
                layer.digest,
                layer.data.len()
            )
        };
        let (bait, own) = (descriptor(&theirs), descriptor(&ours));
        let old = format!("[{{\"blobSum\":\"{}\"}}]", theirs.digest);
        let both =
            format!("{{\"digest\":\"{}\",{}", theirs.digest, own[1..].replace("\"digest\"", "\"Digest\""));
        let documents = [
            (MANIFEST, format!("\"config\":{own},\"layers\":[{bait}],\"Layers\":[{own}]")),
            (docker, format!("\"config\":{own},\"layers\":[{bait}],\"Layers\":[{own}]")),
            (MANIFEST, format!("\"config\":{bait},\"Config\":{own},\"layers\":[{own}]")),
            (MANIFEST, format!("\"config\":{own},\"layers\":[{both}]")),
            (MANIFEST, format!("\"config\":{own},\"layers\":[{own}],\"fsLayers\":{old}")),
            (index, format!("\"manifests\":[],\"fsLayers\":{old}")),
        ];
        let mut taken = 0;
        for (media_type, fields) in documents {
            let document = format!("{{\"schemaVersion\":2,\"mediaType\":\"{media_type}\",{fields}}}");
            let file = host.dir().join("document");
            std::fs::write(&file, &document)?;
            let mut curl = host.command("curl");
            curl.args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", "-X", "PUT", "-H"]);
            curl.arg(format!("Content-Type: {media_type}")).arg("--data-binary");
            curl.arg(format!("@{}", file.display()));
            let pushed =
                run(curl.arg(format!("http://{}/v2/mallory/app/manifests/bait", registry.authority())))?;
            if pushed.trim() != "201" {
                continue;
            }
            taken += 1;
            let digest = Digest::of(Algorithm::Sha256, document.as_bytes());
            for reference in [digest.to_string(), "bait".to_owned()] {
                let answer = ask("GET", &format!("/v2/mallory/app/manifests/{reference}"))?;
                ensure!(answer.status == 200, "{document}: {}", answer.status);
                for method in ["HEAD", "GET"] {
                    let answer = ask(method, &blob("mallory/app", &theirs))?;
                    denied(&format!("{method} after {document}"), &answer, &[404])?;
                }
            }
        }
        ensure!(taken >= 4, "the registry took {taken} of them only: that shows nothing");
        Ok(())
    })())
}

/// The whole of it once more by a client that is nobody's friend: curl with what the challenge says.
#[test]
fn a_challenge_through_the_mirror_leads_to_a_token_that_the_mirror_takes() -> Result<()> {
    tenants(1, &[], |scene| {
        let node = &scene.cluster.nodes[0];
        let answer = scene.ask(node, &blob("ann/app", &scene.anns), None)?;
        let challenge = answer
            .header("www-authenticate")
            .context("no challenge")?
            .to_owned();
        let part = |name: &str| -> Result<&str> {
            let (_, rest) = challenge
                .split_once(&format!("{name}=\""))
                .with_context(|| challenge.clone())?;
            Ok(rest.split('"').next().unwrap_or_default())
        };
        let service = format!("service={}", part("service")?);
        let scope = format!("scope={}", part("scope")?);
        let said = run(node
            .host()
            .command("curl")
            .args(["-sSf", "-G", "-u", &format!("{}:{}", ANN.0, ANN.1)])
            .args([
                "--data-urlencode",
                &service,
                "--data-urlencode",
                &scope,
                part("realm")?,
            ]))?;
        let said: serde_json::Value = serde_json::from_str(&said)?;
        let token = format!("Bearer {}", said["token"].as_str().context("no token")?);
        let answer = scene.ask(node, &blob("ann/app", &scene.anns), Some(&token))?;
        ensure!(
            answer.status == 200 && answer.body == scene.anns.data,
            "{}",
            answer.status
        );
        Ok(())
    })
}
