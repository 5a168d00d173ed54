//! The control port: JSON in, JSON out, one request after the other, never a fault.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use hawker_oci::digest::Algorithm;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

use super::http::{Connection, Request};
use super::{Blob, Content, State};

/// The body of `POST /blobs`.
#[derive(Deserialize)]
struct NewBlob {
    repository: String,
    #[serde(flatten)]
    source: BlobSource,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum BlobSource {
    Generated { seed: u64, size_bytes: u64 },
    File { file: PathBuf },
}

/// The body of `POST /manifests`.
#[derive(Deserialize)]
struct NewManifest {
    repository: String,
    reference: String,
    media_type: String,
    text: String,
}

pub(super) async fn serve(listener: TcpListener, state: Arc<State>) {
    loop {
        // A failed accept concerns a client that is gone.
        if let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(converse(tcp, Arc::clone(&state)));
        }
    }
}

async fn converse(tcp: TcpStream, state: Arc<State>) -> io::Result<()> {
    let mut connection = Connection::accept(tcp, None).await?;
    while let Some(request) = connection.request().await? {
        let (status, value) = match handle(&state, &request) {
            Ok(value) => (200, value),
            Err(Refused::NotFound) => (404, json!({"error": "see the module's table of requests"})),
            Err(Refused::Json(error)) => (400, json!({"error": error.to_string()})),
            Err(Refused::File(error)) => (400, json!({"error": error.to_string()})),
        };
        connection.write_json(status, &value).await?;
    }
    Ok(())
}

/// Why a request to the control port fails: always the caller's fault.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("no such request")]
    NotFound,
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    File(#[from] io::Error),
}

fn handle(state: &State, request: &Request) -> Result<Value, Refused> {
    let words: Vec<_> = request.path().trim_matches('/').split('/').collect();
    match (request.method.as_str(), words.as_slice()) {
        ("GET", ["log"]) => Ok(serde_json::to_value(state.log.entries())?),
        ("GET", ["totals"]) => Ok(serde_json::to_value(state.log.totals())?),
        ("DELETE", ["log"]) => {
            state.log.clear();
            Ok(json!({}))
        }
        ("POST", ["faults"]) => {
            let rule = serde_json::from_slice(&request.body)?;
            Ok(json!({"id": state.change_rules(|rules| rules.add(rule))}))
        }
        ("DELETE", ["faults"]) => {
            state.change_rules(super::fault::Rules::clear);
            Ok(json!({}))
        }
        ("DELETE", ["faults", id]) => {
            let id = id.parse().map_err(|_| Refused::NotFound)?;
            state.change_rules(|rules| rules.remove(id));
            Ok(json!({}))
        }
        ("POST", ["blobs"]) => {
            let NewBlob { repository, source } = serde_json::from_slice(&request.body)?;
            let content = match source {
                BlobSource::Generated { seed, size_bytes } => Content::generated(seed, size_bytes),
                BlobSource::File { file } => Content::file(&file)?,
            };
            Ok(describe(state.add_blob(
                &repository,
                content,
                Algorithm::Sha256,
            )?))
        }
        ("POST", ["manifests"]) => {
            let new: NewManifest = serde_json::from_slice(&request.body)?;
            Ok(describe(state.add_manifest(
                &new.repository,
                &new.reference,
                &new.media_type,
                new.text.as_bytes(),
            )))
        }
        _ => Err(Refused::NotFound),
    }
}

fn describe(blob: Blob) -> Value {
    json!({"digest": blob.digest.to_string(), "size_bytes": blob.size_bytes})
}
