//! CRI-O: its mirrors are podman's; a pull as the kubelet asks for it.

use super::cri::{self, Cri};
use super::selftest::{self, Pull};
use super::{Check, podman};
use crate::args::{DoctorArgs, Runtime};

/// The configuration, and a pull.
pub(super) async fn check(args: &DoctorArgs, mirror: &str) -> Vec<Check> {
    let socket = &args.crio_address;
    let alive = async {
        let mut cri = Cri::connect(socket).await?;
        let version = cri.version().await?;
        anyhow::Ok((cri, version))
    };
    let (mut cri, running) = match alive.await {
        Ok((cri, version)) => (
            Some(cri),
            Check::pass("crio", format!("{version} at {}", socket.display())),
        ),
        Err(error) => {
            let cure = "is it running, are you root? Name its socket by --crio-address";
            (
                None,
                Check::fail("crio", format!("{}: {error}", socket.display()), cure),
            )
        }
    };
    let image = match (&args.image, &mut cri) {
        (Some(image), _) => Some(selftest::full_reference(image)),
        (None, Some(cri)) => cri.any_image().await,
        (None, None) => None,
    };
    let registry = image.as_deref().map(selftest::registry_of);
    let mut checks = vec![
        running,
        podman::configured("crio mirrors", Runtime::Crio, registry, mirror),
    ];
    match (&image, &mut cri) {
        (Some(image), Some(cri)) => {
            let cure = podman::cure(Runtime::Crio, registry.unwrap_or("docker.io"), mirror)
                + "\nthen systemctl reload crio";
            checks.push(
                cri.pull_through(Pull {
                    name: cri::CHECK,
                    runtime: "CRI-O",
                    image,
                    admin: &args.admin,
                    mirror,
                    cure,
                })
                .await,
            );
        }
        (None, _) => checks.push(Check::skip(
            cri::CHECK,
            "CRI-O holds no image to try",
            "name one: --image REF",
        )),
        (_, None) => checks.push(Check::skip(cri::CHECK, "CRI-O does not answer", "start it")),
    }
    checks
}
