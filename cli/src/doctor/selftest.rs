//! A pull by the real client, and the mirror's own record of what it gave to that pull.

use std::time::Duration;

use anyhow::bail;
use hawker_proxy::recent::{RecentPage, RecentRequest};
use tokio::process::Command;

use super::{Check, probe};
use crate::client;
use crate::program::run;

const PULL_TIMEOUT: Duration = Duration::from_secs(300);
/// Between two looks at the mirror's record, which keeps the latest requests only.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// A pull that shall go through the mirror.
pub(super) struct Pull<'a> {
    /// The check's name.
    pub(super) name: &'static str,
    pub(super) runtime: &'a str,
    pub(super) image: &'a str,
    /// The admin address of the daemon.
    pub(super) admin: &'a str,
    /// The mirror's address.
    pub(super) mirror: &'a str,
    /// The cure for a pull that goes past the mirror.
    pub(super) cure: String,
}

/// The mirror's record of one image's pull.
#[derive(Debug, PartialEq, Eq)]
enum Finding {
    /// The mirror was not asked for anything of the repository.
    NotAsked,
    /// The mirror gave no manifest, or not all blobs that it was asked for: its words.
    Refused(String),
    /// The mirror gave a manifest, and the runtime needed no blob.
    ManifestOnly(Box<RecentRequest>),
    /// The mirror gave a manifest and each blob that it was asked for: how many blobs.
    Served(usize),
}

impl Pull<'_> {
    /// Pulls by `pull` and says whether the mirror served that.
    pub(super) async fn through(self, pull: impl Future<Output = anyhow::Result<()>>) -> Check {
        let start = match page(self.admin, u64::MAX).await {
            Ok(page) => page.next,
            Err(error) => {
                let found = format!("the mirror's requests can't be read: {error}");
                return Check::skip(self.name, found, "start the daemon, or name it by --admin");
            }
        };
        let mut record = Record {
            admin: self.admin,
            next: start,
            missed: 0,
            requests: Vec::new(),
        };
        let pulled = record
            .during(tokio::time::timeout(PULL_TIMEOUT, pull))
            .await;
        let pulled = pulled.unwrap_or_else(|_| {
            Err(anyhow::anyhow!(
                "it took longer than {} s",
                PULL_TIMEOUT.as_secs()
            ))
        });
        record.look().await;
        let asked = record.of(repository_of(self.image));
        if asked.is_empty() && record.missed > 0 {
            let found = "the mirror has so many other clients that its record of this pull is gone";
            return Check::skip(self.name, found, "try again when less is pulled");
        }
        match (finding(&asked), pulled) {
            (Finding::ManifestOnly(manifest), Ok(())) => self.after_manifest(&manifest).await,
            (finding, pulled) => self.judge(finding, pulled),
        }
    }

    fn judge(self, finding: Finding, pulled: anyhow::Result<()>) -> Check {
        let Self {
            name,
            runtime,
            image,
            cure,
            ..
        } = self;
        match (finding, pulled) {
            (Finding::NotAsked, Ok(())) => Check::fail(
                name,
                format!("{runtime} pulled {image}, but past Hawker"),
                cure,
            ),
            (Finding::NotAsked, Err(error)) => {
                let found = format!(
                    "{runtime} asked the mirror nothing, and could not pull {image}: {error}"
                );
                Check::fail(
                    name,
                    found,
                    format!("is the image's name right, the network up? If so:\n{cure}"),
                )
            }
            (Finding::Refused(words), Ok(())) => {
                let found = format!(
                    "{runtime} asked the mirror for {image} and then pulled past Hawker, since the mirror answered:\n{words}"
                );
                Check::fail(name, found, cure_of(&words))
            }
            (Finding::Refused(words), Err(error)) => {
                let found = format!(
                    "{runtime} asked the mirror, but could not pull {image}: {error}\nthe mirror answered:\n{words}"
                );
                Check::fail(name, found, cure_of(&words))
            }
            (Finding::ManifestOnly(_) | Finding::Served(_), Err(error)) => {
                let found = format!(
                    "the mirror answered all that {runtime} asked, but {runtime} could not pull {image}: {error}"
                );
                Check::fail(name, found, "the runtime's own log says more")
            }
            (Finding::ManifestOnly(_), Ok(())) => Check::skip(
                name,
                format!("{runtime} held all layers of {image} already"),
                OTHER_IMAGE,
            ),
            (Finding::Served(blobs), Ok(())) => {
                let blobs = if blobs == 1 {
                    "1 blob".to_owned()
                } else {
                    format!("{blobs} blobs")
                };
                Check::pass(
                    name,
                    format!(
                        "{runtime} pulls through Hawker: the mirror gave manifest and {blobs} of {image}"
                    ),
                )
                .proving_a_pull()
            }
        }
    }

    /// The runtime held all layers, so the mirror has yet to prove that it gives them.
    async fn after_manifest(self, manifest: &RecentRequest) -> Check {
        let Self {
            name,
            runtime,
            image,
            mirror,
            ..
        } = self;
        let found = format!("{runtime} asks Hawker for {image}, but held all its layers already");
        match probe::a_blob(mirror, manifest).await {
            Ok(size) => Check::pass(
                name,
                format!(
                    "{runtime} pulls through Hawker: the mirror gave the manifest of {image}; {runtime} held the layers already, so \
                     this program asked the mirror for a blob, and got {size} verified bytes"
                ),
            )
            .proving_a_pull(),
            Err(probe::Failed::Unauthorized) => {
                let found = format!("{found}; it is private, so this program can't ask the mirror for them");
                Check::skip(name, found, OTHER_IMAGE)
            }
            Err(probe::Failed::Refused(words)) => {
                Check::fail(name, format!("{found}, and the mirror does not give them:\n{words}"), cure_of(&words))
            }
            Err(probe::Failed::Other(why)) => {
                Check::skip(name, format!("{found}, and asking for them failed: {why}"), OTHER_IMAGE)
            }
        }
    }
}

const OTHER_IMAGE: &str = "name an image that the runtime does not hold yet: --image REF";

/// The mirror's record of requests, read again and again.
struct Record<'a> {
    admin: &'a str,
    next: u64,
    missed: u64,
    requests: Vec<RecentRequest>,
}

impl Record<'_> {
    /// Reads the record as long as `work` goes on.
    async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(LOOK_INTERVAL) => self.look().await,
            }
        }
    }

    async fn look(&mut self) {
        if let Ok(page) = page(self.admin, self.next).await {
            self.next = page.next;
            self.missed += page.missed;
            self.requests.extend(page.requests);
        }
    }

    /// The requests for one repository. The registry's name does not count: docker names none, podman may use another.
    fn of(&self, repository: &str) -> Vec<&RecentRequest> {
        self.requests
            .iter()
            .filter(|request| request.repository == repository)
            .collect()
    }
}

async fn page(admin: &str, after: u64) -> anyhow::Result<RecentPage> {
    let answer = client::get(admin, &format!("/requests?after={after}")).await?;
    match answer.status {
        200 => Ok(serde_json::from_str(&answer.body)?),
        404 => {
            bail!(
                "{admin} has no /requests: is it a hawker daemon with a mirror, of this program's version?"
            )
        }
        status => bail!("{admin} answers {status} to /requests"),
    }
}

fn finding(asked: &[&RecentRequest]) -> Finding {
    if asked.is_empty() {
        return Finding::NotAsked;
    }
    let is_served = |request: &RecentRequest| matches!(request.status, 200 | 206);
    let of_kind = |kind: &'static str| {
        asked
            .iter()
            .copied()
            .filter(move |request| request.kind == kind)
    };
    let blobs = || of_kind("blob").filter(|request| request.method == "GET");
    let given =
        |reference: &str| blobs().any(|blob| blob.reference == reference && is_served(blob));
    let manifest = of_kind("manifest").rfind(|request| is_served(request));
    let lacking: Vec<&RecentRequest> = blobs().filter(|blob| !given(&blob.reference)).collect();
    match manifest {
        None => Finding::Refused(words(
            asked.iter().copied().filter(|request| !is_served(request)),
        )),
        Some(_) if !lacking.is_empty() => Finding::Refused(words(lacking.into_iter())),
        Some(manifest) => {
            let mut digests: Vec<&str> = blobs().map(|blob| blob.reference.as_str()).collect();
            digests.sort_unstable();
            digests.dedup();
            match digests.len() {
                0 => Finding::ManifestOnly(Box::new(manifest.clone())),
                blobs => Finding::Served(blobs),
            }
        }
    }
}

/// The last few refusals in the mirror's words, each reason once.
fn words<'a>(refused: impl Iterator<Item = &'a RecentRequest>) -> String {
    let (mut lines, mut told) = (Vec::new(), Vec::new());
    for RecentRequest {
        method,
        kind,
        reference,
        status,
        reason,
        ..
    } in refused
    {
        if told.contains(&(status, reason)) {
            continue;
        }
        told.push((status, reason));
        let reason = if reason.is_empty() {
            String::new()
        } else {
            format!(" ({reason})")
        };
        lines.push(format!("{status} to {method} {kind} {reference}{reason}"));
    }
    lines.split_off(lines.len().saturating_sub(3)).join("\n")
}

/// The cure for a refusal that begins with its status.
fn cure_of(words: &str) -> &'static str {
    let last = words.lines().last().unwrap_or_default();
    match last.split(' ').next().unwrap_or_default() {
        "401" => {
            "the image is private, and this pull had no credentials that count: name a public image by --image REF"
        }
        "403" => {
            "do what the mirror says; where it only passes on the registry's 403, the registry refuses this image"
        }
        "404" => {
            "is the image's name right, and does its registry have it? Else name another by --image REF"
        }
        "429" => {
            "the registry limits requests: wait, or give the daemon credentials (see docs/security.md)"
        }
        "502" | "503" | "504" => {
            "the daemon can't get it from the registry: is that reachable from this host, its name, endpoint and CA right?"
        }
        _ => "the daemon's log says more",
    }
}

/// A pull by a program.
pub(super) async fn by(program: Command) -> anyhow::Result<()> {
    run(program, PULL_TIMEOUT).await.map(drop)
}

/// The full form of a reference: `alpine` is `docker.io/library/alpine:latest`.
pub(super) fn full_reference(image: &str) -> String {
    let (first, rest) = image.split_once('/').unwrap_or(("", image));
    let has_host = first.contains(['.', ':']) || first == "localhost";
    let named = match (has_host, first) {
        (true, "docker.io" | "index.docker.io") if !rest.contains('/') => {
            format!("docker.io/library/{rest}")
        }
        (true, "index.docker.io") => format!("docker.io/{rest}"),
        (true, _) => image.to_owned(),
        (false, "") => format!("docker.io/library/{rest}"),
        (false, _) => format!("docker.io/{image}"),
    };
    let last = named.rsplit('/').next().unwrap_or_default();
    if last.contains([':', '@']) {
        named
    } else {
        format!("{named}:latest")
    }
}

/// The registry in a full reference.
pub(super) fn registry_of(reference: &str) -> &str {
    reference.split('/').next().unwrap_or_default()
}

/// The repository in a full reference.
fn repository_of(reference: &str) -> &str {
    let (_, path) = reference.split_once('/').unwrap_or(("", reference));
    let path = path.split('@').next().unwrap_or_default();
    match path.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    fn request(words: &str) -> RecentRequest {
        let mut words = words.split(' ');
        let mut next = || words.next().unwrap_or_default().to_owned();
        let (method, kind, reference, status) = (next(), next(), next(), next().parse().unwrap());
        let reason = if status < 400 {
            String::new()
        } else {
            format!("why {status}")
        };
        RecentRequest {
            method,
            kind,
            reference,
            status,
            reason,
            ..RecentRequest::default()
        }
    }

    fn outcome(requests: &[&str], pulled: bool) -> (Outcome, String) {
        let requests: Vec<RecentRequest> = requests.iter().map(|words| request(words)).collect();
        let asked: Vec<&RecentRequest> = requests.iter().collect();
        let pull = Pull {
            name: "p",
            runtime: "r",
            image: "i",
            admin: "a",
            mirror: "m",
            cure: "configure".into(),
        };
        let check = pull.judge(
            finding(&asked),
            if pulled {
                Ok(())
            } else {
                Err(anyhow::anyhow!("no"))
            },
        );
        assert_eq!(
            check.proves_pull,
            check.outcome == Outcome::Pass,
            "{check:?}"
        );
        (check.outcome, check.found)
    }

    #[test]
    fn a_pull_passes_only_where_the_mirror_gave_manifest_and_blobs() {
        use Outcome::{Fail, Pass, Skip};
        let served = [
            "HEAD manifest v1 200",
            "GET manifest d 200",
            "GET blob a 200",
            "GET blob b 206",
        ];
        assert_eq!(outcome(&served, true).0, Pass);
        assert_eq!(outcome(&served, false).0, Fail);
        for (requests, expected, words) in [
            (&[][..], Fail, "past Hawker"),
            (
                &["HEAD manifest v1 502", "GET manifest v1 502"],
                Fail,
                "502 to HEAD manifest v1 (why 502)",
            ),
            (
                &["HEAD manifest v1 404", "HEAD manifest v1 404"],
                Fail,
                "404 to HEAD manifest v1 (why 404)",
            ),
            (
                &["HEAD manifest v1 401"],
                Fail,
                "401 to HEAD manifest v1 (why 401)",
            ),
            (
                &["HEAD manifest v1 200", "GET blob a 404"],
                Fail,
                "404 to GET blob a (why 404)",
            ),
            (
                &["HEAD manifest v1 200", "GET blob a 200", "GET blob b 502"],
                Fail,
                "502 to GET blob b",
            ),
            (
                &["HEAD manifest v1 404", "GET blob a 200"],
                Fail,
                "404 to HEAD manifest",
            ),
            // A challenge that is answered, and a blob that comes at the second try, are no faults.
            (
                &[
                    "HEAD manifest v1 401",
                    "HEAD manifest v1 200",
                    "GET blob a 401",
                    "GET blob a 200",
                ],
                Pass,
                "1 blob ",
            ),
            (
                &["HEAD manifest d 200", "HEAD blob d 404", "GET blob a 200"],
                Pass,
                "1 blob ",
            ),
            // Cosign's signature need not be there.
            (
                &[
                    "GET manifest v1 200",
                    "GET blob a 200",
                    "GET manifest sha256-d.sig 404",
                ],
                Pass,
                "1 blob ",
            ),
            (&["HEAD manifest v1 200"], Skip, "held all layers"),
        ] {
            let (found, said) = outcome(requests, true);
            assert_eq!(found, expected, "{requests:?}: {said}");
            assert!(said.contains(words), "{words}: {said}");
        }
        let (found, said) = outcome(&["HEAD manifest v1 502"], false);
        assert!(
            found == Fail && said.contains("why 502") && said.contains(": no"),
            "{said}"
        );
    }

    #[test]
    fn references_have_a_repository_and_get_what_docker_gives_them() {
        for (short, full, repository) in [
            (
                "alpine",
                "docker.io/library/alpine:latest",
                "library/alpine",
            ),
            ("alpine:3", "docker.io/library/alpine:3", "library/alpine"),
            (
                "docker.io/alpine",
                "docker.io/library/alpine:latest",
                "library/alpine",
            ),
            ("me/app", "docker.io/me/app:latest", "me/app"),
            ("10.0.0.1:5000/a/b", "10.0.0.1:5000/a/b:latest", "a/b"),
            ("localhost/a:v1@sha256:00", "localhost/a:v1@sha256:00", "a"),
        ] {
            assert_eq!(full_reference(short), full);
            assert_eq!(repository_of(full), repository);
        }
        assert_eq!(registry_of("10.0.0.1:5000/a/b:c"), "10.0.0.1:5000");
    }
}
