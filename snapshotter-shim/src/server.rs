//! The service at a unix socket.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::api::services::snapshots::v1::snapshots_server::SnapshotsServer;
use crate::mounts::OverlayOptions;
use crate::service::Service;
use crate::store::{Store, StoreError};

/// Requests of one connection at a time. containerd has one connection.
const REQUESTS_MAX: usize = 256;
/// The time that requests under way have after a signal to end.
const DRAIN: Duration = Duration::from_secs(20);

/// The place of a snapshotter.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The folder of all its data.
    pub root: PathBuf,
    /// Its unix socket.
    pub socket: PathBuf,
}

/// The reason why a snapshotter does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The data cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The socket cannot be listened at.
    #[error("cannot listen at {}: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The server broke off.
    #[error("the server failed: {0}")]
    Server(#[from] tonic::transport::Error),
}

/// Serves until `shutdown`, then ends the requests under way. `ready` is called once connections are accepted.
///
/// # Errors
/// When the data or the socket cannot be used.
pub async fn serve(
    settings: &Settings,
    shutdown: CancellationToken,
    ready: impl FnOnce(),
) -> Result<(), ServeError> {
    let store = Arc::new(Store::open(
        &settings.root,
        OverlayOptions::of_this_kernel(),
    )?);
    // The lock of the store is held: no other snapshotter of this root listens here.
    let listener = listen(&settings.socket).map_err(|source| ServeError::Socket {
        path: settings.socket.clone(),
        source,
    })?;
    tracing::info!(root = %settings.root.display(), socket = %settings.socket.display(), "the snapshotter is ready");
    ready();
    let server = Server::builder()
        .concurrency_limit_per_connection(REQUESTS_MAX)
        .add_service(SnapshotsServer::new(Service::new(store)))
        .serve_with_incoming_shutdown(
            UnixListenerStream::new(listener),
            shutdown.clone().cancelled_owned(),
        );
    let late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    let result = tokio::select! {
        result = server => result.map_err(Into::into),
        () = late => {
            tracing::warn!("requests are still under way after {} s: ending without them", DRAIN.as_secs());
            Ok(())
        }
    };
    let _ = std::fs::remove_file(&settings.socket);
    result
}

/// Listens at a path, in place of a process that died.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::other("a file that is no socket stands there"));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(io::Error::other(
                "another process listens there; stop it, or choose another --socket",
            ));
        }
        Ok(_) => std::fs::remove_file(path)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    // A client of this socket has the rights of root over all images.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
