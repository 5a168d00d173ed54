//! The requests of a kubelet to containerd: as much of the container runtime interface (`runtime/v1/api.proto`) as a
//! pull needs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use tonic::client::Grpc;
use tonic::transport::{Endpoint, Uri};
use tonic_prost::ProstCodec;

const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// A pull secret, as kubelets send it: without a server's address.
#[derive(Clone, PartialEq, prost::Message)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

/// `ImageService/PullImage`.
pub(super) async fn pull_image(
    socket: &Path,
    reference: &str,
    user: Option<(&str, &str)>,
) -> Result<String> {
    let socket = socket.to_owned();
    let connect = move |_: Uri| {
        let socket = socket.clone();
        async {
            tokio::net::UnixStream::connect(socket)
                .await
                .map(TokioIo::new)
        }
    };
    // The name is for the request's head only.
    let endpoint = Endpoint::from_static("http://containerd").timeout(DEADLINE);
    let channel = endpoint
        .connect_with_connector(tower::service_fn(connect))
        .await?;
    let mut client = Grpc::new(channel);
    client.ready().await?;
    let request = PullImageRequest {
        image: Some(ImageSpec {
            image: reference.into(),
        }),
        auth: user.map(|(name, password)| AuthConfig {
            username: name.into(),
            password: password.into(),
        }),
    };
    let path = "/runtime.v1.ImageService/PullImage".parse()?;
    let codec = ProstCodec::<PullImageRequest, PullImageResponse>::default();
    let response = client
        .unary(tonic::Request::new(request), path, codec)
        .await;
    Ok(response
        .with_context(|| format!("PullImage {reference}"))?
        .into_inner()
        .image_ref)
}
