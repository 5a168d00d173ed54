//! The one place that turns what went wrong into an answer: status, code and words of the distribution spec ("Error Codes").

use bytes::Bytes;
use hawker_oci::digest::Digest;
use hawker_oci::reference::Refused;
use http::header::{
    ALLOW, CONNECTION, CONTENT_RANGE, CONTENT_TYPE, RETRY_AFTER, WARNING, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

use super::Answer;
use super::body::Payload;
use crate::download::FlightError;
use crate::metrics::{Metrics, RequestKind};
use crate::origin::{OriginError, PassError, is_retry_after};

/// Headers of an origin's refusal that its caller needs.
const OF_A_REFUSAL: [HeaderName; 3] = [WWW_AUTHENTICATE, RETRY_AFTER, WARNING];
/// When to come again, in seconds, where the origin does not say: clients that get a 429 without it come at once.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("5");

/// Why a request gets no content.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Problem {
    /// Its head can be read in more than one way, or in none; the next bytes on the connection are in doubt too.
    #[error("the request is malformed: {0}")]
    Malformed(&'static str),
    /// It is none for a forward proxy.
    #[error(
        "this is a forward proxy, for HTTP_PROXY and HTTPS_PROXY: requests name a whole address here"
    )]
    NotProxied,
    /// It names another host than the connection was made for.
    #[error("this connection leads to {0} and nowhere else")]
    Misdirected(String),
    /// Nobody said that the host may be reached.
    #[error(
        "{host} is not reached from here: for a registry, add [registries.\"{host}\"] with endpoints = [\"{scheme}://{host}\"] to \
         the daemon's configuration; for any other host, add [[intercept]] with host = \"{host}\" and action = \"direct\" (and its \
         network to allow_network where its address is private); then send the daemon SIGHUP"
    )]
    RefusedHost {
        /// As settings and rules name it.
        host: String,
        /// `http` or `https`.
        scheme: http::uri::Scheme,
    },
    /// It can't be made to look like the host.
    #[error("no certificate can be made for {0}")]
    NoCertificate(String),
    /// Its body does not come.
    #[error("the request's body came too slowly")]
    SlowClient,
    /// Too many long manifests are under way.
    #[error("too many long manifests at once, come again")]
    Crowded,
    /// As many requests of its application, or of its tag, are being answered as may be.
    #[error("too many requests of this application at once, come again")]
    ApplicationFull,
    /// As many tunnels as there may be.
    #[error("too many tunnels, come again")]
    TooManyTunnels,
    /// It makes no sense.
    #[error("{0}")]
    Refused(#[from] Refused),
    /// It has been here before.
    #[error(
        "this request has come round in a circle: a registry or proxy that this mirror asks leads back to it"
    )]
    Loop,
    /// It names no registry, and there is no default.
    #[error(
        "which registry? Send ns=HOST or put the host before the repository, or configure default_registry"
    )]
    NoRegistry,
    /// It asks for more ranges, or for more in them, than one answer may have. Clients that get a 400 ask for fewer.
    #[error("too many ranges, or longer ones than the blob is: ask for fewer at once")]
    TooManyRanges,
    /// It asks for a range that begins after the end.
    #[error("the blob has {0} bytes")]
    Unsatisfiable(u64),
    /// It has no token of ours that is good for it. This challenge says where to get one.
    #[error("a token of this mirror's is needed")]
    Challenged(HeaderValue),
    /// The origin said no, with these headers.
    #[error("the origin answered {status}")]
    Origin {
        /// The status of its answer.
        status: StatusCode,
        /// Those of its headers that matter.
        headers: HeaderMap,
    },
    /// The origin's answer is neither content nor a refusal: 204, a redirect to nowhere, a 304 that nobody asked for. Its status
    /// must not reach clients: containerd takes any 2xx for the content, and leaves no mirror for a 3xx.
    #[error("the origin answered {0}, which is neither content nor a refusal")]
    Odd(StatusCode),
    /// The origin can't be asked.
    #[error("{0}")]
    Unasked(#[from] OriginError),
    /// The download failed.
    #[error("{0}")]
    Flight(#[from] FlightError),
    /// The bytes here came from elsewhere, and the registry has not proved that it has them.
    #[error("{0}")]
    Unproved(String),
    /// A manifest that nobody should send.
    #[error("the origin's manifest is longer than {0} bytes")]
    TooLong(usize),
    /// Something that is no manifest.
    #[error(
        "the origin's answer is not what was asked for; perhaps it is a page that asks for a login"
    )]
    NoManifest,
    /// The origin's bytes are not what it, or the request, says they are.
    #[error("the origin's manifest does not match {0}")]
    WrongManifest(Digest),
    /// Nothing came in time.
    #[error("neither peers nor the origin gave anything in time")]
    Slow,
}

impl From<PassError> for Problem {
    fn from(error: PassError) -> Self {
        match error {
            PassError::Origin(error) => Problem::Unasked(error),
            PassError::Slow => Problem::SlowClient,
        }
    }
}

impl Problem {
    /// The origin's refusal, as far as it concerns a client.
    pub(super) fn refusal(status: StatusCode, from: &HeaderMap) -> Self {
        if !is_refusal(status) {
            return Problem::Odd(status);
        }
        let mut headers = HeaderMap::new();
        for name in OF_A_REFUSAL {
            let may_pass = |value: &&HeaderValue| name != RETRY_AFTER || is_retry_after(value);
            headers.extend(
                from.get_all(&name)
                    .iter()
                    .filter(may_pass)
                    .map(|value| (name.clone(), value.clone())),
            );
        }
        Problem::Origin { status, headers }
    }

    /// The status of the answer.
    pub(super) fn status(&self) -> StatusCode {
        let from_number =
            |status: u16| StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
        match self {
            Problem::Malformed(_) | Problem::NotProxied => StatusCode::BAD_REQUEST,
            Problem::Misdirected(_) => StatusCode::MISDIRECTED_REQUEST,
            Problem::RefusedHost { .. } => StatusCode::FORBIDDEN,
            Problem::NoCertificate(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Problem::SlowClient => StatusCode::REQUEST_TIMEOUT,
            Problem::Crowded | Problem::TooManyTunnels => StatusCode::SERVICE_UNAVAILABLE,
            Problem::ApplicationFull => StatusCode::TOO_MANY_REQUESTS,
            Problem::Refused(refused) => from_number(refused.status()),
            Problem::Loop => StatusCode::LOOP_DETECTED,
            Problem::NoRegistry => StatusCode::NOT_FOUND,
            Problem::TooManyRanges => StatusCode::BAD_REQUEST,
            Problem::Unsatisfiable(_) => StatusCode::RANGE_NOT_SATISFIABLE,
            Problem::Challenged(_) => StatusCode::UNAUTHORIZED,
            Problem::Origin { status, .. } => *status,
            Problem::Flight(FlightError::Origin(status)) => Some(from_number(*status))
                .filter(|status| is_refusal(*status))
                .unwrap_or(StatusCode::BAD_GATEWAY),
            Problem::Unproved(_) => StatusCode::BAD_GATEWAY,
            Problem::Unasked(OriginError::Forbidden(_)) => StatusCode::FORBIDDEN,
            Problem::Flight(FlightError::Stopping) => StatusCode::SERVICE_UNAVAILABLE,
            Problem::Slow => StatusCode::GATEWAY_TIMEOUT,
            Problem::Unasked(_)
            | Problem::Odd(_)
            | Problem::Flight(_)
            | Problem::TooLong(_)
            | Problem::NoManifest
            | Problem::WrongManifest(_) => StatusCode::BAD_GATEWAY,
        }
    }

    /// Whether the origin can't be asked just now, so that what it said before may have to do.
    pub(super) fn is_out_of_order(&self) -> bool {
        // A request that the origin may not get, and a senseless answer, are not silence.
        let is_answer = matches!(
            self,
            Problem::Unasked(OriginError::Forbidden(_) | OriginError::Broken { .. })
                | Problem::ApplicationFull
                | Problem::Odd(_)
                | Problem::Unproved(_)
                | Problem::NoManifest
                | Problem::TooLong(_)
                | Problem::WrongManifest(_)
        );
        let status = self.status();
        !is_answer && (status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS)
    }

    fn code(&self, kind: RequestKind) -> &'static str {
        match self {
            Problem::Refused(refused) => refused.code(),
            Problem::NoRegistry => "NAME_UNKNOWN",
            Problem::Loop
            | Problem::TooManyRanges
            | Problem::Malformed(_)
            | Problem::NotProxied => "UNSUPPORTED",
            Problem::Unsatisfiable(_) => "SIZE_INVALID",
            Problem::TooLong(_) | Problem::NoManifest | Problem::WrongManifest(_) => {
                "MANIFEST_INVALID"
            }
            _ => match (self.status().as_u16(), kind) {
                (401, _) => "UNAUTHORIZED",
                (403, _) => "DENIED",
                (404, RequestKind::Blob) => "BLOB_UNKNOWN",
                (404, RequestKind::Manifest) => "MANIFEST_UNKNOWN",
                (404, _) => "NAME_UNKNOWN",
                (405, _) => "UNSUPPORTED",
                (429, _) => "TOOMANYREQUESTS",
                _ => "UNKNOWN",
            },
        }
    }

    /// The answer to a request of this kind, told and counted.
    pub(crate) fn counted(&self, kind: RequestKind, metrics: &Metrics) -> Answer {
        tracing::info!(status = self.status().as_u16(), reason = %self, "not served");
        metrics.request(kind, self.status().as_u16());
        self.answer(kind)
    }

    /// The answer to a request of this kind.
    pub(super) fn answer(&self, kind: RequestKind) -> Answer {
        let mut response = Response::new(Payload::Notice(self.body(kind)));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        match self {
            Problem::Origin { headers: given, .. } => headers.extend(given.clone()),
            Problem::Challenged(challenge) => {
                headers.insert(WWW_AUTHENTICATE, challenge.clone());
            }
            Problem::Refused(Refused::Method) => {
                headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            }
            Problem::Malformed(_) => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Problem::Crowded | Problem::TooManyTunnels => {
                headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
            }
            Problem::Unsatisfiable(size) => {
                let range = HeaderValue::try_from(hawker_oci::range::unsatisfied(*size));
                headers.insert(CONTENT_RANGE, range.expect("digits are a header's value"));
            }
            _ => {}
        }
        if self.status() == StatusCode::TOO_MANY_REQUESTS && !headers.contains_key(RETRY_AFTER) {
            headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }

    /// `{"errors": [{"code", "message"}]}`
    pub(super) fn body(&self, kind: RequestKind) -> Bytes {
        let error = serde_json::json!({ "code": self.code(kind), "message": self.to_string() });
        serde_json::json!({ "errors": [error] }).to_string().into()
    }
}

/// Whether a status is a refusal that clients understand.
pub(super) fn is_refusal(status: StatusCode) -> bool {
    status.is_client_error() || status.is_server_error()
}

#[cfg(test)]
mod tests {
    use hawker_oci::digest::{Algorithm, DigestError};

    use super::*;

    #[test]
    fn each_problem_has_its_status_and_code() {
        let digest = Digest::of(Algorithm::Sha256, b"");
        let origin = |status: u16| {
            Problem::refusal(StatusCode::from_u16(status).unwrap(), &HeaderMap::new())
        };
        let refused_host = Problem::RefusedHost {
            host: "r:5000".into(),
            scheme: http::uri::Scheme::HTTPS,
        };
        let words = refused_host.to_string();
        for cure in [
            "[registries.\"r:5000\"]",
            "endpoints = [\"https://r:5000\"]",
            "host = \"r:5000\"",
        ] {
            assert!(words.contains(cure), "{words}");
        }
        let unreachable = OriginError::Unreachable {
            registry: "r".into(),
            reason: "down".into(),
        };
        for (problem, kind, status, code) in [
            (
                Refused::Method.into(),
                RequestKind::Other,
                405,
                "UNSUPPORTED",
            ),
            (
                Refused::Endpoint.into(),
                RequestKind::Other,
                404,
                "UNSUPPORTED",
            ),
            (
                Refused::Name.into(),
                RequestKind::Other,
                400,
                "NAME_INVALID",
            ),
            (
                Refused::Digest(DigestError::Hex).into(),
                RequestKind::Other,
                400,
                "DIGEST_INVALID",
            ),
            (
                Problem::Malformed("x"),
                RequestKind::Other,
                400,
                "UNSUPPORTED",
            ),
            (Problem::NotProxied, RequestKind::Other, 400, "UNSUPPORTED"),
            (
                Problem::Misdirected("r".into()),
                RequestKind::Other,
                421,
                "UNKNOWN",
            ),
            (refused_host, RequestKind::Tunnel, 403, "DENIED"),
            (
                Problem::Unproved("r".into()),
                RequestKind::Blob,
                502,
                "UNKNOWN",
            ),
            (
                Problem::NoCertificate("r".into()),
                RequestKind::Tunnel,
                500,
                "UNKNOWN",
            ),
            (Problem::SlowClient, RequestKind::Passed, 408, "UNKNOWN"),
            (Problem::TooManyTunnels, RequestKind::Tunnel, 503, "UNKNOWN"),
            (Problem::Crowded, RequestKind::Manifest, 503, "UNKNOWN"),
            (Problem::Loop, RequestKind::Manifest, 508, "UNSUPPORTED"),
            (
                Problem::NoRegistry,
                RequestKind::Manifest,
                404,
                "NAME_UNKNOWN",
            ),
            (
                Problem::TooManyRanges,
                RequestKind::Blob,
                400,
                "UNSUPPORTED",
            ),
            (
                Problem::Unsatisfiable(7),
                RequestKind::Blob,
                416,
                "SIZE_INVALID",
            ),
            (origin(401), RequestKind::Blob, 401, "UNAUTHORIZED"),
            (origin(403), RequestKind::Blob, 403, "DENIED"),
            (origin(404), RequestKind::Blob, 404, "BLOB_UNKNOWN"),
            (origin(404), RequestKind::Manifest, 404, "MANIFEST_UNKNOWN"),
            (origin(404), RequestKind::Tags, 404, "NAME_UNKNOWN"),
            (origin(429), RequestKind::Blob, 429, "TOOMANYREQUESTS"),
            (origin(503), RequestKind::Blob, 503, "UNKNOWN"),
            (
                OriginError::Forbidden("r".into()).into(),
                RequestKind::Blob,
                403,
                "DENIED",
            ),
            (unreachable.into(), RequestKind::Blob, 502, "UNKNOWN"),
            (
                FlightError::Origin(404).into(),
                RequestKind::Blob,
                404,
                "BLOB_UNKNOWN",
            ),
            (
                FlightError::Origin(304).into(),
                RequestKind::Blob,
                502,
                "UNKNOWN",
            ),
            (origin(204), RequestKind::Blob, 502, "UNKNOWN"),
            (origin(206), RequestKind::Manifest, 502, "UNKNOWN"),
            (origin(302), RequestKind::Manifest, 502, "UNKNOWN"),
            (origin(304), RequestKind::Tags, 502, "UNKNOWN"),
            (
                FlightError::Unreachable("x".into()).into(),
                RequestKind::Blob,
                502,
                "UNKNOWN",
            ),
            (
                FlightError::WrongDigest(digest).into(),
                RequestKind::Blob,
                502,
                "UNKNOWN",
            ),
            (
                FlightError::Stopping.into(),
                RequestKind::Blob,
                503,
                "UNKNOWN",
            ),
            (
                Problem::TooLong(4),
                RequestKind::Manifest,
                502,
                "MANIFEST_INVALID",
            ),
            (
                Problem::NoManifest,
                RequestKind::Manifest,
                502,
                "MANIFEST_INVALID",
            ),
            (
                Problem::WrongManifest(digest),
                RequestKind::Manifest,
                502,
                "MANIFEST_INVALID",
            ),
            (Problem::Slow, RequestKind::Blob, 504, "UNKNOWN"),
            (
                Problem::Challenged(HeaderValue::from_static("Bearer")),
                RequestKind::Ping,
                401,
                "UNAUTHORIZED",
            ),
        ] {
            assert_eq!(
                (problem.status().as_u16(), problem.code(kind)),
                (status, code),
                "{problem:?}"
            );
        }
    }

    #[test]
    fn a_429_always_says_when_to_come_again() {
        let mut headers = HeaderMap::new();
        let status = StatusCode::TOO_MANY_REQUESTS;
        let retry_after = |headers: &HeaderMap| {
            Problem::refusal(status, headers)
                .answer(RequestKind::Blob)
                .headers()[RETRY_AFTER]
                .clone()
        };
        assert_eq!(retry_after(&headers), "5");
        headers.insert(RETRY_AFTER, HeaderValue::from_static("60"));
        assert_eq!(retry_after(&headers), "60");
    }

    #[test]
    fn a_challenge_is_passed_on_and_nothing_else_is() {
        let mut headers = HeaderMap::new();
        headers.append(
            WWW_AUTHENTICATE,
            HeaderValue::from_static("Bearer realm=\"https://r/token\""),
        );
        headers.append(
            WWW_AUTHENTICATE,
            HeaderValue::from_static("Basic realm=\"r\""),
        );
        headers.append("set-cookie", HeaderValue::from_static("a=b"));
        let answer =
            Problem::refusal(StatusCode::UNAUTHORIZED, &headers).answer(RequestKind::Manifest);
        assert_eq!(answer.headers().get_all(WWW_AUTHENTICATE).iter().count(), 2);
        assert!(!answer.headers().contains_key("set-cookie"));
    }
}
