//! The Snapshots service over a [`Store`]. Disk work runs on threads of its own, and a request that was cancelled still ends whole.

use std::io::ErrorKind;
use std::sync::Arc;

use tokio_stream::Iter;
use tonic::{Code, Request, Response, Status};

use crate::api::services::snapshots::v1 as api;
use crate::catalog::{Committal, Creation, Kind, Record, Refusal};
use crate::filter::Filters;
use crate::store::{Store, StoreError};

/// Snapshots in one message of a `List`.
const LIST_BATCH: usize = 100;

/// The service.
#[derive(Clone, Debug)]
pub struct Service(Arc<Store>);

impl Service {
    /// The service over `store`.
    #[must_use]
    pub const fn new(store: Arc<Store>) -> Self {
        Self(store)
    }

    async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        name: String,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let store = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || work(&store)).await;
        let result = match done {
            Ok(result) => result.map_err(|error| status(&error)),
            Err(error) => Err(Status::internal(format!(
                "{operation} did not end: {error}"
            ))),
        };
        match &result {
            Ok(_) => tracing::debug!(operation, name, "done"),
            Err(status) if is_fault(status.code()) => {
                tracing::warn!(operation, name, error = status.message(), "failed");
            }
            Err(status) => tracing::debug!(operation, name, error = status.message(), "refused"),
        }
        result
    }
}

const fn is_fault(code: Code) -> bool {
    matches!(code, Code::Internal | Code::ResourceExhausted)
}

/// The one place that maps errors to gRPC.
fn status(error: &StoreError) -> Status {
    let code = match error {
        StoreError::Refused(Refusal::NotFound(_)) => Code::NotFound,
        StoreError::Refused(Refusal::AlreadyExists(_)) => Code::AlreadyExists,
        StoreError::Refused(Refusal::Precondition(_)) => Code::FailedPrecondition,
        StoreError::Refused(Refusal::Invalid(_)) => Code::InvalidArgument,
        StoreError::Disk { source, .. }
            if matches!(
                source.kind(),
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded
            ) =>
        {
            Code::ResourceExhausted
        }
        StoreError::Disk { .. } | StoreError::Root(_) => Code::Internal,
    };
    Status::new(code, error.to_string())
}

fn info(record: Record) -> api::Info {
    let kind = match record.kind {
        Kind::View => api::Kind::View,
        Kind::Active => api::Kind::Active,
        Kind::Committed => api::Kind::Committed,
    };
    api::Info {
        name: record.name,
        parent: record.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(record.created.into()),
        updated_at: Some(record.updated.into()),
        labels: record.labels.into_iter().collect(),
    }
}

#[tonic::async_trait]
impl api::snapshots_server::Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<api::PrepareSnapshotRequest>,
    ) -> Result<Response<api::PrepareSnapshotResponse>, Status> {
        let request = request.into_inner();
        let creation = Creation {
            kind: Kind::Active,
            key: request.key.clone(),
            parent: request.parent,
            labels: request.labels.into_iter().collect(),
        };
        let mounts = self
            .run("prepare", request.key, |store| store.create(creation))
            .await?;
        Ok(Response::new(api::PrepareSnapshotResponse { mounts }))
    }

    async fn view(
        &self,
        request: Request<api::ViewSnapshotRequest>,
    ) -> Result<Response<api::ViewSnapshotResponse>, Status> {
        let request = request.into_inner();
        let creation = Creation {
            kind: Kind::View,
            key: request.key.clone(),
            parent: request.parent,
            labels: request.labels.into_iter().collect(),
        };
        let mounts = self
            .run("view", request.key, |store| store.create(creation))
            .await?;
        Ok(Response::new(api::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(
        &self,
        request: Request<api::MountsRequest>,
    ) -> Result<Response<api::MountsResponse>, Status> {
        let key = request.into_inner().key;
        let mounts = self
            .run("mounts", key.clone(), move |store| store.mounts(&key))
            .await?;
        Ok(Response::new(api::MountsResponse { mounts }))
    }

    async fn commit(
        &self,
        request: Request<api::CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let committal = Committal {
            key: request.key.clone(),
            name: request.name,
            parent: request.parent,
            labels: request.labels.into_iter().collect(),
        };
        self.run("commit", request.key, |store| store.commit(committal))
            .await
            .map(Response::new)
    }

    async fn remove(
        &self,
        request: Request<api::RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        self.run("remove", key.clone(), move |store| store.remove(&key))
            .await
            .map(Response::new)
    }

    async fn stat(
        &self,
        request: Request<api::StatSnapshotRequest>,
    ) -> Result<Response<api::StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let record = self
            .run("stat", key.clone(), move |store| store.stat(&key))
            .await?;
        let info = Some(info(record));
        Ok(Response::new(api::StatSnapshotResponse { info }))
    }

    async fn update(
        &self,
        request: Request<api::UpdateSnapshotRequest>,
    ) -> Result<Response<api::UpdateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let wanted = request
            .info
            .ok_or_else(|| Status::invalid_argument("the request has no info"))?;
        let paths = request.update_mask.unwrap_or_default().paths;
        let labels = wanted.labels.into_iter().collect();
        let name = wanted.name;
        let record = self
            .run("update", name.clone(), move |store| {
                store.update(&name, &labels, &paths)
            })
            .await?;
        let info = Some(info(record));
        Ok(Response::new(api::UpdateSnapshotResponse { info }))
    }

    type ListStream = Iter<std::vec::IntoIter<Result<api::ListSnapshotsResponse, Status>>>;

    async fn list(
        &self,
        request: Request<api::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let filters = request.into_inner().filters;
        let records = self
            .run("list", String::new(), move |store| {
                Ok(store.list(&Filters::parse(&filters)?))
            })
            .await?;
        let mut records = records.into_iter().map(info).peekable();
        let mut batches = Vec::new();
        while records.peek().is_some() {
            let info = records.by_ref().take(LIST_BATCH).collect();
            batches.push(Ok(api::ListSnapshotsResponse { info }));
        }
        Ok(Response::new(tokio_stream::iter(batches)))
    }

    async fn usage(
        &self,
        request: Request<api::UsageRequest>,
    ) -> Result<Response<api::UsageResponse>, Status> {
        let key = request.into_inner().key;
        let usage = self
            .run("usage", key.clone(), move |store| store.usage(&key))
            .await?;
        Ok(Response::new(api::UsageResponse {
            size: i64::try_from(usage.size_bytes).unwrap_or(i64::MAX),
            inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        }))
    }

    async fn cleanup(&self, _: Request<api::CleanupRequest>) -> Result<Response<()>, Status> {
        self.run("cleanup", String::new(), Store::clean_up)
            .await
            .map(Response::new)
    }
}
