//! Pulls as the kubelet asks for them: CRI's image service (`runtime.v1`), over the runtime's socket. Of its messages only what
//! is needed here.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

use super::Check;
use super::selftest::Pull;

/// The name of the check.
pub(super) const CHECK: &str = "CRI pull";

const CONNECT: Duration = Duration::from_secs(5);
const QUICK: Duration = Duration::from_secs(20);
/// A node may hold many images.
const ANSWER_MAX_BYTES: usize = 16 << 20;

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// The request to pull, to remove and to tell the status of an image alike.
#[derive(Clone, PartialEq, Message)]
struct ImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, repeated, tag = "2")]
    repo_tags: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct ImageStatus {
    #[prost(message, optional, tag = "1")]
    image: Option<Image>,
}

#[derive(Clone, PartialEq, Message)]
struct Images {
    #[prost(message, repeated, tag = "1")]
    images: Vec<Image>,
}

#[derive(Clone, PartialEq, Message)]
struct Version {
    #[prost(string, tag = "2")]
    runtime_name: String,
    #[prost(string, tag = "3")]
    runtime_version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

/// It has no CRI, or it is switched off.
#[derive(Debug, thiserror::Error)]
#[error("its CRI plugin is not there: {0}")]
struct NoPlugin(String);

/// A runtime's CRI.
pub(super) struct Cri(Grpc<Channel>);

impl Cri {
    /// Connects to a socket.
    pub(super) async fn connect(socket: &Path) -> anyhow::Result<Self> {
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The socket is the address; this one is for the form.
        let endpoint = Endpoint::from_static("http://localhost").connect_timeout(CONNECT);
        let channel = endpoint.connect_with_connector(connector).await?;
        Ok(Self(
            Grpc::new(channel).max_decoding_message_size(ANSWER_MAX_BYTES),
        ))
    }

    /// Name and version of the runtime.
    pub(super) async fn version(&mut self) -> anyhow::Result<String> {
        let version: Version = self
            .quick("/runtime.v1.RuntimeService/Version", Nothing {})
            .await?;
        Ok(format!(
            "{} {}",
            version.runtime_name, version.runtime_version
        ))
    }

    /// An image that the runtime holds, whose name says where it came from.
    pub(super) async fn any_image(&mut self) -> Option<String> {
        let images: Images = self
            .quick("/runtime.v1.ImageService/ListImages", Nothing {})
            .await
            .ok()?;
        let mut names = images.images.into_iter().flat_map(|image| image.repo_tags);
        names.find(|name| super::selftest::registry_of(name).contains('.'))
    }

    /// Pulls the image, and takes it away again if it was not there before.
    pub(super) async fn pull_through(&mut self, pull: Pull<'_>) -> Check {
        let request = || ImageRequest {
            image: Some(ImageSpec {
                image: pull.image.to_owned(),
            }),
        };
        let (status, asked, removal) = (request(), request(), request());
        let status: anyhow::Result<ImageStatus> = self
            .quick("/runtime.v1.ImageService/ImageStatus", status)
            .await;
        if let Err(error) = &status
            && error.is::<NoPlugin>()
        {
            return Check::skip(
                CHECK,
                error.to_string(),
                "the kubelet could not use it, so nothing is to be proved",
            );
        }
        let check = pull
            .through(async {
                self.call::<_, Nothing>("/runtime.v1.ImageService/PullImage", asked)
                    .await
                    .map(drop)
            })
            .await;
        if status.is_ok_and(|status| status.image.is_none()) {
            let _: anyhow::Result<Nothing> = self
                .quick("/runtime.v1.ImageService/RemoveImage", removal)
                .await;
        }
        check
    }

    async fn quick<Q, A>(&mut self, method: &'static str, request: Q) -> anyhow::Result<A>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        tokio::time::timeout(QUICK, self.call(method, request))
            .await
            .context("it does not answer")?
    }

    async fn call<Q, A>(&mut self, method: &'static str, request: Q) -> anyhow::Result<A>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        self.0.ready().await?;
        let codec = ProstCodec::<Q, A>::default();
        let answer = self
            .0
            .unary(
                tonic::Request::new(request),
                PathAndQuery::from_static(method),
                codec,
            )
            .await;
        match answer {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) if status.code() == tonic::Code::Unimplemented => {
                Err(NoPlugin(status.message().to_owned()).into())
            }
            Err(status) => anyhow::bail!("{}", status.message()),
        }
    }
}
