//! `hawker configure` points real runtimes at the mirror, and takes that back.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hawker_conformance::lab::{DockerRegistry, Hawker, HawkerPlan, Host, Image, Lab, Process, run};
use hawker_conformance::scene::until;
use hawker_oci::digest::{Algorithm, Digest};
use rustix::process::Signal;

/// The registry's name where it is a part of a path: references allow no port there.
const ALIAS: &str = "origin.test";
const READY: Duration = Duration::from_secs(30);

/// A system of its own for a host: a root that `hawker configure` writes below, and programs that find its /etc in place of
/// the machine's.
struct System {
    host: Host,
    root: PathBuf,
}

impl System {
    fn new(host: &Host) -> Result<Self> {
        let root = host.dir().join("system");
        fs::create_dir(&root)?;
        Ok(Self {
            host: host.clone(),
            root,
        })
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().context("a file in a folder")?)?;
        Ok(fs::write(path, text)?)
    }

    /// `program`, with `/etc/FOLDER` from this root. The mount is the program's alone, and gone with it.
    fn command(&self, folder: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.host.command("unshare");
        command.args([
            "--mount",
            "--",
            "sh",
            "-c",
            "mount --bind \"$0\" \"$1\" && shift && exec \"$@\"",
        ]);
        command
            .arg(self.root.join("etc").join(folder))
            .arg(Path::new("/etc").join(folder))
            .arg(program);
        command
    }

    fn configure(&self, node: &Hawker, line: &str) -> Result<String> {
        run(node
            .cli()?
            .arg("configure")
            .args(line.split(' '))
            .arg("--root")
            .arg(&self.root))
    }

    /// All files below the root.
    fn files(&self) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
        let mut files = BTreeMap::new();
        let mut pending = vec![self.root.clone()];
        while let Some(path) = pending.pop() {
            // A podman with netavark makes this folder of its own at its first use.
            if path.ends_with("etc/containers/networks") {
                continue;
            }
            if path.is_dir() {
                for entry in fs::read_dir(&path)? {
                    pending.push(entry?.path());
                }
                files.insert(path, Vec::new());
            } else {
                files.insert(path.clone(), fs::read(path)?);
            }
        }
        Ok(files)
    }
}

/// A registry, a node that knows it by address and by name, and a system on that node.
fn start(
    lab: &Lab,
    args: impl FnOnce(HawkerPlan, &str) -> HawkerPlan,
) -> Result<(DockerRegistry, Hawker, System)> {
    let registry = DockerRegistry::start(&lab.host("origin")?)?;
    let authority = registry.authority();
    let plan = HawkerPlan::proxy(&lab.host("node")?).plain_registry(&authority);
    let node = args(
        plan.flag("--registry", format!("{ALIAS}=http://{authority}")),
        &authority,
    )
    .start()?;
    let system = System::new(node.host())?;
    Ok((registry, node, system))
}

/// Manifest and blob requests at the node's mirror.
fn asked(node: &Hawker) -> Result<f64> {
    let of = |kind: &str| node.metric("hawker_requests_total", &[kind]);
    Ok(of("kind=\"manifest\"")? + of("kind=\"blob\"")?)
}

fn start_containerd(system: &System) -> Result<Process> {
    let log = system.host.dir().join("containerd.log");
    let mut containerd = Process::start(&mut system.command("containerd", "containerd"), log)?;
    let mut probe = system.host.command("ctr");
    probe
        .arg("--address")
        .arg(system.root.join("containerd.sock"))
        .arg("version");
    containerd
        .wait_ready(READY, || run(&mut probe).is_ok())
        .context("containerd")?;
    Ok(containerd)
}

#[test]
fn containerd_by_ctr_and_by_cri_goes_through_hawker_until_that_is_undone() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, node, system) = start(&lab, |plan, _| plan)?;
        let reference = registry.push(&Image::noise(81, &[300_000]), "team/app", "v1")?;
        let (root, authority) = (system.root.display(), registry.authority());
        // Without config_path, and with a hosts.toml of somebody's that works without Hawker.
        let config = format!(
            "version = 2 # Debian's\nroot = \"{root}/root\"\nstate = \"{root}/state\"\n[grpc]\n  address = \"{root}/containerd.sock\"\n\
             [ttrpc]\n  address = \"{root}/ttrpc.sock\"\n[plugins.\"io.containerd.internal.v1.opt\"]\n  path = \"{root}/opt\"\n"
        );
        system.write("etc/containerd/config.toml", &config)?;
        let theirs = format!("server = \"http://{authority}\"\n\n[host.\"http://{authority}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
        system.write(&format!("etc/containerd/certs.d/{authority}/hosts.toml"), &theirs)?;
        let before = system.files()?;
        let line = format!("containerd --registry _default --registry {authority}");
        let said = system.configure(&node, &line)?;
        ensure!(said.contains("+  config_path") && said.contains("systemctl restart containerd"), "{said}");
        ensure!(system.configure(&node, &line)?.contains("Nothing to change"));
        let after = system.files()?;

        let doctor = || -> Result<(Option<i32>, String)> {
            let mut command = system.command("containerd", hawker_conformance::lab::hawker_binary()?);
            command.args(["doctor", "--runtime", "containerd", "--image", &reference]);
            let output = command.output()?;
            Ok((output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned()))
        };
        let containerd = start_containerd(&system)?;
        let (code, said) = doctor()?;
        ensure!(code == Some(0), "exit {code:?}: {said}");
        for runtime in ["containerd pulls through Hawker", "containerd's CRI pulls through Hawker"] {
            ensure!(said.contains(runtime), "{runtime}: {said}");
        }
        drop(containerd);

        let through = asked(&node)?;
        for dir in ["root", "state", "opt"] {
            let _ = fs::remove_dir_all(system.root.join(dir));
        }
        for socket in ["containerd.sock", "ttrpc.sock"] {
            let _ = fs::remove_file(system.root.join(socket));
        }
        ensure!(system.files()? == after);
        system.configure(&node, "containerd --remove")?;
        ensure!(system.files()? == before, "it is not what it was: {:?}", system.files()?.keys());
        let _containerd = start_containerd(&system)?;
        let (code, said) = doctor()?;
        ensure!(code == Some(1) && said.contains("but past Hawker"), "exit {code:?}: {said}");
        ensure!(asked(&node)? == through, "it asked Hawker all the same: {said}");
        Ok(())
    })())
}

#[test]
fn podman_buildah_and_skopeo_go_through_hawker_until_that_is_undone() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, node, system) = start(&lab, |plan, _| plan)?;
        let image = Image::noise(82, &[300_000]);
        let reference = registry.push(&image, "team/app", "v1")?;
        system.write(
            "etc/containers/policy.json",
            "{\"default\": [{\"type\": \"insecureAcceptAnything\"}]}\n",
        )?;
        system.write(
            "etc/containers/registries.conf",
            "unqualified-search-registries = [\"docker.io\"]\n",
        )?;
        let before = system.files()?;
        let scratch = node.host().dir();
        let pull = |name: &str, round: &str| -> Result<()> {
            let dir = |kind: &str| scratch.join(format!("{name}-{round}-{kind}"));
            let mut command = system.command("containers", name);
            if name == "skopeo" {
                command.args(["copy", "--quiet", "--src-tls-verify=false"]);
                command
                    .arg(format!("docker://{reference}"))
                    .arg(format!("dir:{}", dir("copy").display()));
            } else {
                command
                    .arg("--root")
                    .arg(dir("root"))
                    .arg("--runroot")
                    .arg(dir("run"));
                command.args([
                    "--storage-driver",
                    "vfs",
                    "pull",
                    "--quiet",
                    "--tls-verify=false",
                    &reference,
                ]);
            }
            run(&mut command).map(drop)
        };
        system.configure(
            &node,
            &format!("podman --registry {}={ALIAS}", registry.authority()),
        )?;
        for name in ["podman", "buildah", "skopeo"] {
            let already = asked(&node)?;
            pull(name, "configured")?;
            ensure!(asked(&node)? > already, "{name} went past Hawker");
        }
        let reads = registry.blob_reads(Some(&image.layers[0].digest));
        ensure!(
            reads.body_bytes == image.size_bytes(),
            "the registry sent more than one copy: {reads:?}"
        );
        system.configure(&node, "podman --remove")?;
        ensure!(
            system.files()? == before,
            "it is not what it was: {:?}",
            system.files()?.keys()
        );
        let through = asked(&node)?;
        pull("podman", "removed")?;
        ensure!(asked(&node)? == through, "podman asked Hawker all the same");
        Ok(())
    })())
}

/// An OCI layout of a manifest that holds a signature as cosign attaches it. Debian's tools copy such signatures without a look at
/// the key, so any bytes do.
fn sign(layout: &Path, repository: &str, digest: &str) -> Result<()> {
    let payload = serde_json::json!({
        "critical": {
            "identity": { "docker-reference": repository },
            "image": { "docker-manifest-digest": digest },
            "type": "cosign container image signature",
        },
        "optional": {},
    })
    .to_string();
    let signature = STANDARD.encode("signature");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let write = |text: &str, media_type: &str| -> Result<serde_json::Value> {
        let digest = Digest::of(Algorithm::Sha256, text.as_bytes());
        fs::write(blobs.join(digest.hex()), text)?;
        Ok(
            serde_json::json!({ "mediaType": media_type, "digest": digest.to_string(), "size": text.len() }),
        )
    };
    let mut layer = write(&payload, "application/vnd.dev.cosign.simplesigning.v1+json")?;
    let config = serde_json::json!({
        "architecture": "", "os": "", "config": {}, "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    layer["annotations"] = serde_json::json!({ "dev.cosignproject.cosign/signature": signature });
    let config = write(
        &config.to_string(),
        "application/vnd.oci.image.config.v1+json",
    )?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer] });
    let mut root = write(&manifest.to_string(), kind)?;
    root["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "latest" });
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [root] });
    fs::write(layout.join("index.json"), index.to_string())?;
    Ok(fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )?)
}

#[test]
fn attached_signatures_are_found_at_the_mirror() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, node, system) = start(&lab, |plan, _| plan)?;
        let authority = registry.authority();
        let reference = registry.push(&Image::noise(85, &[100_000]), "team/app", "v1")?;
        let mut inspect = system.host.command("skopeo");
        inspect.args(["inspect", "--tls-verify=false", "--format", "{{.Digest}}"]);
        let digest = run(inspect.arg(format!("docker://{reference}")))?
            .trim()
            .to_owned();
        let layout = node.host().dir().join("signature");
        sign(&layout, &format!("{authority}/team/app"), &digest)?;
        let layout = format!("oci:{}:latest", layout.display());
        registry.push_layout(
            &layout,
            "team/app",
            &format!("{}.sig", digest.replace(':', "-")),
        )?;
        let policy = "{\"default\": [{\"type\": \"insecureAcceptAnything\"}]}\n";
        system.write("etc/containers/policy.json", policy)?;
        let attached = format!("docker:\n  {authority}:\n    use-sigstore-attachments: true\n");
        system.write("etc/containers/registries.d/origin.yaml", &attached)?;
        let before = system.files()?;
        // Whether the signature came with the image.
        let pull = |round: &str| -> Result<bool> {
            let mut command = system.command("containers", "skopeo");
            command.args([
                "copy",
                "--quiet",
                "--src-tls-verify=false",
                &format!("docker://{reference}"),
            ]);
            let copy = node.host().dir().join(format!("copy-{round}"));
            run(command.arg(format!("dir:{}", copy.display())))?;
            Ok(copy.join("signature-1").exists())
        };
        ensure!(pull("direct")?, "skopeo takes no attached signatures");
        let line = format!("podman --registry {authority}={ALIAS}");
        let said = system.configure(&node, &format!("{line} --dry-run"))?;
        ensure!(
            said.contains(&format!("+  \"{}/{ALIAS}\":", node.mirror())),
            "{said}"
        );
        ensure!(system.files()? == before, "a dry run wrote something");
        system.configure(&node, &line)?;
        ensure!(
            pull("configured")?,
            "the signature was not found at the mirror"
        );
        ensure!(asked(&node)? > 0.0, "skopeo went past Hawker");
        // The file is what does it.
        let ours = system
            .root
            .join("etc/containers/registries.d/50-hawker.yaml");
        let text = fs::read(&ours)?;
        fs::remove_file(&ours)?;
        ensure!(
            !pull("without")?,
            "the signature was found without the file"
        );
        fs::write(&ours, text)?;
        system.configure(&node, "podman --remove")?;
        ensure!(
            system.files()? == before,
            "it is not what it was: {:?}",
            system.files()?.keys()
        );
        ensure!(pull("removed")?, "the signature is gone");
        Ok(())
    })())
}

#[test]
fn dockerd_goes_through_hawker_from_a_reload_on_until_that_is_undone() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, node, system) = start(&lab, |plan, authority| {
            plan.flag("--default-registry", "docker.io")
                .flag("--registry", format!("docker.io=http://{authority}"))
        })?;
        for (seed, tag) in [(83, "one"), (84, "two")] {
            registry.push(&Image::noise(seed, &[300_000]), "library/app", tag)?;
        }
        let text = "{\n    \"bridge\": \"none\",\n    \"iptables\": false,\n    \"ip-forward\": false,\n    \
                    \"storage-driver\": \"vfs\"\n}\n";
        system.write("etc/docker/daemon.json", text)?;
        let dir = node.host().dir();
        let socket = format!("unix://{}", dir.join("docker.sock").display());
        let docker = |args: &[&str]| run(node.host().command("docker").args(["-H", &socket]).args(args));
        let start = || -> Result<Process> {
            let mut dockerd = system.command("docker", "dockerd");
            dockerd.args(["-H", &socket]);
            for (flag, path) in
                [("--data-root", "docker"), ("--exec-root", "docker-exec"), ("--pidfile", "docker.pid")]
            {
                dockerd.arg(flag).arg(dir.join(path));
            }
            let mut daemon = Process::start(&mut dockerd, dir.join("dockerd.log"))?;
            daemon.wait_ready(READY, || docker(&["version"]).is_ok()).context("dockerd")?;
            Ok(daemon)
        };
        let mirrored = || Ok(docker(&["info"])?.contains(&format!("http://{}", node.mirror())));
        let daemon = start()?;
        // The key that dockerd makes there at its start counts as there before.
        let before = system.files()?;
        let said = system.configure(&node, "docker")?;
        ensure!(said.contains("systemctl reload docker"), "{said}");
        daemon.signal(Signal::HUP)?;
        until(READY, "dockerd to take notice", mirrored)?;
        docker(&["pull", "app:one"])?;
        let through = asked(&node)?;
        ensure!(through > 0.0, "dockerd went past Hawker");

        let said = system.configure(&node, "docker --remove")?;
        ensure!(said.contains("systemctl restart docker"), "{said}");
        ensure!(system.files()? == before, "it is not what it was");
        drop(daemon);
        let _daemon = start()?;
        ensure!(!mirrored()?, "dockerd has its mirror still");
        ensure!(docker(&["pull", "app:two"]).is_err(), "there is no Docker Hub in a lab");
        ensure!(asked(&node)? == through, "dockerd asked Hawker all the same");
        Ok(())
    })())
}

#[test]
fn a_dry_run_shows_the_difference_and_errors_name_file_cause_and_cure() -> Result<()> {
    let lab = Lab::new()?;
    let host = lab.host("node")?;
    let system = System::new(&host)?;
    system.write("etc/containerd/config.toml", "version = 2\n")?;
    let before = system.files()?;
    let configure = |line: &str| -> Result<(Option<i32>, String)> {
        let mut command = host.command(hawker_conformance::lab::hawker_binary()?);
        let output = command
            .arg("configure")
            .args(line.split(' '))
            .arg("--root")
            .arg(&system.root)
            .output()?;
        let said = [output.stdout, output.stderr].concat();
        Ok((
            output.status.code(),
            String::from_utf8_lossy(&said).into_owned(),
        ))
    };
    let (code, said) = configure("containerd --dry-run")?;
    ensure!(code == Some(0), "exit {code:?}: {said}");
    for part in [
        "--- /dev/null\n",
        "+++ ",
        "@@ -1",
        " version = 2\n",
        "+[host.\"http://127.0.0.1:6500\"]",
        "Nothing was written",
    ] {
        ensure!(said.contains(part), "{part}: {said}");
    }
    ensure!(system.files()? == before, "a dry run wrote something");
    let (code, said) = configure("containerd --mirror nonsense --registry a/b")?;
    ensure!(
        code == Some(2) && said.contains("--mirror") && said.contains("--registry"),
        "exit {code:?}: {said}"
    );
    system.write("etc/docker/daemon.json", "{\"debug\": true,}")?;
    let (code, said) = configure("docker")?;
    ensure!(
        code == Some(1) && said.contains("daemon.json") && said.contains("line 1"),
        "exit {code:?}: {said}"
    );
    let (code, said) = configure("docker --remove")?;
    ensure!(
        code == Some(0) && said.contains("Nothing to undo"),
        "exit {code:?}: {said}"
    );
    Ok(())
}
