//! The output of `hawker up`: the way for the next node to join, and for containerd to use the mirror.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hawker_core::message::Role;
use hawker_identity::authority::create_token;

/// How long the printed token can be used.
const TOKEN_TTL: Duration = Duration::from_secs(3600);

/// The facts that the output shows.
pub(crate) struct JoinHelp {
    pub(crate) scheduler: String,
    pub(crate) mirror: String,
    pub(crate) data_dir: PathBuf,
}

impl JoinHelp {
    /// Makes a token and prints. The token goes to standard output alone: never to the log.
    pub(crate) fn print(&self) {
        match create_token(&self.data_dir, Role::Peer, TOKEN_TTL) {
            Ok(token) => {
                let _ = crate::print::line(self.text(&token.to_string()));
            }
            Err(error) => {
                tracing::warn!(%error, "no token could be made; try `hawker token create`")
            }
        }
    }

    fn text(&self, token: &str) -> String {
        let Self {
            scheduler,
            mirror,
            data_dir,
        } = self;
        let data_dir = if data_dir == Path::new(crate::resolve::DATA_DIR) {
            String::new()
        } else {
            format!(" --data-dir {}", data_dir.display())
        };
        let mirror = if mirror == crate::resolve::MIRROR {
            String::new()
        } else {
            format!(" --mirror http://{mirror}")
        };
        format!(
            "Hawker is up.\n\n\
             The next node joins with this token (for one node, within an hour), given on standard input:\n\n  \
             hawker proxy --join {scheduler} --token-file -\n\n  {token}\n\n\
             More tokens, here: hawker token create{data_dir} (for another seed: --role seed)\n\n\
             On each node, containerd pulls through Hawker after this (podman, crio, docker and buildkit likewise):\n\n  \
             hawker configure containerd{mirror}\n\n\
             `hawker doctor` checks it.",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_pasted() {
        let help = JoinHelp {
            scheduler: "10.0.0.1:6502".into(),
            mirror: "127.0.0.1:6500".into(),
            data_dir: "/data".into(),
        };
        let text = help.text("hawker1.a.b.c");
        for part in [
            "\n  hawker proxy --join 10.0.0.1:6502 --token-file -\n",
            "\n  hawker1.a.b.c\n",
            "hawker token create --data-dir /data",
            "\n  hawker configure containerd\n",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }
}
