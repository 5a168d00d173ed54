//! `hawker ca`: the certificate that clients of the forward proxy are to trust.

#![allow(clippy::print_stdout, reason = "a command that prints")]

use std::path::Path;

use hawker_proxy::intercept::{CERTIFICATE_FILE, authority_dir};

use crate::args::CaArgs;

/// Prints the certificate in PEM form, and nothing else.
pub(crate) fn print(args: &CaArgs) -> anyhow::Result<()> {
    print!("{}", certificate(&args.data_dir)?);
    Ok(())
}

/// `hawker up` keeps its proxy's data in a folder of its own.
fn certificate(data_dir: &Path) -> anyhow::Result<String> {
    let [own, of_up] = [data_dir.to_owned(), data_dir.join("proxy")]
        .map(|dir| authority_dir(&dir).join(CERTIFICATE_FILE));
    let file = if of_up.exists() && !own.exists() {
        of_up
    } else {
        own
    };
    std::fs::read_to_string(&file).map_err(|error| {
        anyhow::anyhow!(
            "{}: {error}; the daemon makes it when it first starts with --forward-proxy: look at --data-dir, and run this as root",
            file.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_certificate_is_found_where_either_daemon_keeps_it() {
        for below in ["", "proxy"] {
            let dir = tempfile::tempdir().unwrap();
            let error = certificate(dir.path()).unwrap_err().to_string();
            assert!(error.contains("--forward-proxy"), "{error}");
            let folder = authority_dir(&dir.path().join(below));
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(CERTIFICATE_FILE), "PEM").unwrap();
            assert_eq!(certificate(dir.path()).unwrap(), "PEM");
        }
    }
}
