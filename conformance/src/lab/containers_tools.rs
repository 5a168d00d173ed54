//! podman, buildah and skopeo on a host of a lab: with a storage, mirrors and credentials of their own.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::host::Host;
use super::process::run;

/// The tools that share containers/image, as podman's and CRI-O's pulls do.
#[derive(Debug)]
pub struct ContainersTools {
    host: Host,
    dir: PathBuf,
}

impl ContainersTools {
    /// Tools that know no mirror yet.
    ///
    /// # Errors
    /// When their configuration cannot be written.
    pub fn new(host: &Host) -> Result<Self> {
        let dir = host.dir().join("containers");
        fs::create_dir_all(&dir)?;
        let tools = Self {
            host: host.clone(),
            dir,
        };
        let path = |name: &str| tools.dir.join(name).display().to_string();
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n",
            path("storage"),
            path("run")
        );
        fs::write(tools.dir.join("storage.conf"), storage)?;
        fs::write(
            tools.dir.join("policy.json"),
            r#"{"default": [{"type": "insecureAcceptAnything"}]}"#,
        )?;
        fs::write(tools.dir.join("registries.conf"), "")?;
        fs::write(tools.dir.join("auth.json"), "{}")?;
        Ok(tools)
    }

    /// `registry` (`host:port`) is asked at `mirror` (`host:port/path`) first; both by plain HTTP.
    ///
    /// # Errors
    /// When the configuration cannot be written.
    pub fn mirror(&self, registry: &str, mirror: &str) -> Result<()> {
        let text = format!(
            "[[registry]]\nlocation = \"{registry}\"\ninsecure = true\n\
             [[registry.mirror]]\nlocation = \"{mirror}\"\ninsecure = true\n"
        );
        Ok(fs::write(self.dir.join("registries.conf"), text)?)
    }

    /// Gives these credentials (name and password) to whoever is asked at `location` (`host:port/path`).
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn log_in(&self, location: &str, (name, password): (&str, &str)) -> Result<()> {
        use base64::Engine as _;
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("{name}:{password}"));
        let auths = serde_json::json!({ "auths": { location: { "auth": auth } } });
        Ok(fs::write(self.dir.join("auth.json"), auths.to_string())?)
    }

    /// `podman pull`.
    ///
    /// # Errors
    /// When it fails.
    pub fn podman_pull(&self, reference: &str) -> Result<()> {
        run(self.command("podman").args([
            "--cgroup-manager=cgroupfs",
            "pull",
            "--quiet",
            reference,
        ]))
        .map(drop)
    }

    /// `buildah pull`.
    ///
    /// # Errors
    /// When it fails.
    pub fn buildah_pull(&self, reference: &str) -> Result<()> {
        run(self.command("buildah").args(["pull", "--quiet", reference])).map(drop)
    }

    /// `skopeo copy` to a folder; gives the folder.
    ///
    /// # Errors
    /// When it fails.
    pub fn skopeo_copy(&self, reference: &str) -> Result<PathBuf> {
        let target = self.dir.join("copied");
        // Content that is there already would not be asked for again.
        let _ = fs::remove_dir_all(&target);
        let mut command = self.command("skopeo");
        // It reads no variable for this.
        command
            .arg("--registries-conf")
            .arg(self.dir.join("registries.conf"));
        command.args(["copy", "--quiet", &format!("docker://{reference}")]);
        run(command.arg(format!("dir:{}", target.display())))?;
        Ok(target)
    }

    /// Forgets the images pulled.
    ///
    /// # Errors
    /// When podman refuses.
    pub fn remove_all(&self) -> Result<()> {
        run(self.command("podman").args(["rmi", "--all", "--force"])).map(drop)
    }

    fn command(&self, tool: &str) -> Command {
        let mut command = self.host.command(tool);
        command.env(
            "CONTAINERS_REGISTRIES_CONF",
            self.dir.join("registries.conf"),
        );
        command.env("CONTAINERS_STORAGE_CONF", self.dir.join("storage.conf"));
        command.env("REGISTRY_AUTH_FILE", self.dir.join("auth.json"));
        // podman keeps more under its home and the runtime's folder.
        command
            .env("HOME", &self.dir)
            .env("XDG_RUNTIME_DIR", &self.dir)
            .env("TMPDIR", &self.dir);
        command
    }
}
