//! One request to one endpoint: redirects followed, sent again when the connection breaks.

use std::borrow::Cow;
use std::error::Error as _;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, LOCATION, PROXY_AUTHORIZATION};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use tokio::time::Instant;
use url::Url;

use super::connect::{ConnectError, Proxies};
use super::policy::Route;
use super::{Clients, OriginError, Sent};

/// Times that a request is sent to one address when its connection breaks.
const SENDS: u32 = 3;
/// The wait before the third sending; the second one follows at once.
const SEND_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// A request that took longer than this to fail is not sent again.
const SEND_AGAIN_WITHIN: Duration = Duration::from_secs(5);
/// Redirects followed: as many as Go's client follows.
pub(super) const MAX_REDIRECTS: usize = 9;

/// One endpoint being asked.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) clients: &'a Clients,
    /// For the realms of its challenges.
    pub(super) realm_clients: &'a Clients,
    pub(super) route: &'a Route,
    pub(super) registry: &'a str,
    pub(super) endpoint: &'a Url,
    pub(super) proxies: &'a Proxies,
    /// This node, for circles to be noticed.
    pub(super) via: &'a HeaderValue,
}

impl Asked<'_> {
    /// GET or HEAD. Redirects are followed. Credentials go along as long as the host stays the same.
    pub(super) async fn follow(
        &self,
        method: &Method,
        mut url: Url,
        mut headers: HeaderMap,
    ) -> Result<Response<Incoming>, OriginError> {
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(method, &url, &headers, &Bytes::new()).await?;
            let Some(next) = self.redirect(&url, &response)? else {
                return Ok(response);
            };
            if !keeps_credentials(&url, &next) {
                headers.remove(AUTHORIZATION);
            }
            url = next;
        }
        Err(self.broken(format!("it redirects more than {MAX_REDIRECTS} times")))
    }

    /// POST. Redirects that keep the method are followed as long as the host stays the same.
    pub(super) async fn follow_post(
        &self,
        url: &Url,
        headers: &HeaderMap,
        body: &Bytes,
    ) -> Result<Response<Incoming>, OriginError> {
        let mut url = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&Method::POST, &url, headers, body).await?;
            if !matches!(response.status().as_u16(), 307 | 308) {
                return Ok(response);
            }
            match self.redirect(&url, &response)? {
                Some(next) if keeps_credentials(&url, &next) => url = next,
                _ => return Ok(response),
            }
        }
        Err(self.broken(format!("it redirects more than {MAX_REDIRECTS} times")))
    }

    /// The target of the response's redirect, if it is one.
    fn redirect(
        &self,
        from: &Url,
        response: &Response<Incoming>,
    ) -> Result<Option<Url>, OriginError> {
        if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(None);
        }
        let Some(location) = response.headers().get(LOCATION) else {
            return Ok(None);
        };
        let to = from.join(&readable(location.as_bytes())).ok();
        let mut to = to.ok_or_else(|| self.broken("its redirect is no address".into()))?;
        to.set_fragment(None);
        // Neither fails on an address with a host; a name and password in a redirect are nobody's to use.
        let _ = to.set_username("");
        let _ = to.set_password(None);
        match (from.scheme(), to.scheme()) {
            (_, "https") | ("http", "http") => Ok(Some(to)),
            ("https", "http") if self.route.trust.insecure => Ok(Some(to)),
            (_, scheme) => Err(self.broken(format!("it redirects to {scheme}, which is not safe"))),
        }
    }

    /// Sends, and sends again when the connection ends before an answer's head: one from the pool may be dead, and a registry
    /// behind a balancer resets some. One that can't be connected to is not tried again.
    pub(super) async fn send(
        &self,
        method: &Method,
        url: &Url,
        headers: &HeaderMap,
        body: &Bytes,
    ) -> Result<Response<Incoming>, OriginError> {
        let client = if self.route.is_at_home(url) {
            &self.clients.home
        } else {
            &self.clients.away
        };
        let started = Instant::now();
        let mut left = SENDS;
        loop {
            left -= 1;
            match client
                .request(self.request(method, url, headers, body)?)
                .await
            {
                Ok(response) => return Ok(response),
                Err(e) if left == 0 || e.is_connect() || started.elapsed() > SEND_AGAIN_WITHIN => {
                    return Err(self.refused(&e));
                }
                Err(_) => tokio::time::sleep(SEND_AGAIN_AFTER * (SENDS - left - 1)).await,
            }
        }
    }

    fn request(
        &self,
        method: &Method,
        url: &Url,
        headers: &HeaderMap,
        body: &Bytes,
    ) -> Result<Request<Sent>, OriginError> {
        let uri: Uri = url
            .as_str()
            .parse()
            .map_err(|_| self.broken("its address can't be used in a request".into()))?;
        let mut request = Request::new(Either::Left(Full::new(body.clone())));
        *request.method_mut() = method.clone();
        *request.headers_mut() = headers.clone();
        self.authorize_to_proxy(&uri, request.headers_mut());
        *request.uri_mut() = uri;
        Ok(request)
    }

    /// Adds what the environment's proxy wants to see. In a tunnel that went with CONNECT.
    pub(super) fn authorize_to_proxy(&self, uri: &Uri, headers: &mut HeaderMap) {
        if let Some(proxy) = self
            .proxies
            .to(uri)
            .filter(|_| uri.scheme_str() == Some("http"))
            && let Some(auth) = proxy.basic_auth()
        {
            let mut auth = auth.clone();
            auth.set_sensitive(true);
            headers.insert(PROXY_AUTHORIZATION, auth);
        }
    }

    pub(super) fn refused(&self, error: &legacy::Error) -> OriginError {
        let mut source = error.source();
        while let Some(inner) = source {
            if let Some(ConnectError::Forbidden(_)) = inner.downcast_ref() {
                return forbidden(self.registry, inner);
            }
            source = inner.source();
        }
        match error.is_connect() {
            true => unreachable(self.registry, reasons(error)),
            false => self.broken(reasons(error)),
        }
    }

    pub(super) fn broken(&self, reason: String) -> OriginError {
        OriginError::Broken {
            registry: self.registry.to_owned(),
            reason,
        }
    }
}

/// An address as text. Bytes that are no UTF-8 are escaped, as Go's client does.
fn readable(location: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(location) {
        Ok(text) => text.into(),
        Err(_) => location
            .iter()
            .fold(String::new(), |text, byte| match byte.is_ascii() {
                true => text + char::from(*byte).encode_utf8(&mut [0; 4]),
                false => text + &format!("%{byte:02X}"),
            })
            .into(),
    }
}

/// Whether a redirect may take the credentials along: to the same host, whatever its port and scheme, but never from TLS to plain
/// text. A trailing dot makes no other host.
fn keeps_credentials(from: &Url, to: &Url) -> bool {
    let host = |url: &Url| {
        url.host_str()
            .map(|host| host.strip_suffix('.').unwrap_or(host).to_owned())
    };
    host(from) == host(to) && (from.scheme() == to.scheme() || to.scheme() == "https")
}

pub(super) fn forbidden(registry: &str, why: &dyn std::error::Error) -> OriginError {
    OriginError::Forbidden(format!("{registry} ({why})"))
}

pub(super) fn unreachable(registry: &str, reason: String) -> OriginError {
    OriginError::Unreachable {
        registry: registry.to_owned(),
        reason,
    }
}

/// An error with all its causes.
pub(super) fn reasons(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let more = inner.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_is_no_text_is_escaped() {
        let from: Url = "https://r.example/v2/".parse().unwrap();
        for (location, address) in [
            (
                &b"/caf\xc3\xa9?a=%20"[..],
                "https://r.example/caf%C3%A9?a=%20",
            ),
            (b"/caf\xe9?a=%20", "https://r.example/caf%E9?a=%20"),
        ] {
            assert_eq!(from.join(&readable(location)).unwrap().as_str(), address);
        }
    }

    #[test]
    fn credentials_stay_with_their_host_and_never_go_from_tls_to_plain_text() {
        for (from, location, keeps) in [
            ("https://r.example/v2/", "/elsewhere", true),
            ("https://r.example/v2/", "//r.example:8443/v2/", true),
            ("https://r.example/v2/", "https://R.EXAMPLE:8443/v2/", true),
            ("https://r.example/v2/", "https://r.example./v2/", true),
            ("http://r.example/v2/", "https://r.example/v2/", true),
            ("http://r.example/v2/", "http://r.example:5000/v2/", true),
            ("https://r.example/v2/", "http://r.example/v2/", false),
            (
                "https://r.example:8443/v2/",
                "http://r.example:8443/v2/",
                false,
            ),
            ("https://r.example/v2/", "https://blobs.r.example/", false),
            ("https://blobs.r.example/", "https://r.example/", false),
            (
                "https://r.example/",
                "https://r.example.evil.example/",
                false,
            ),
            (
                "https://r.example/",
                "https://r.example@evil.example/",
                false,
            ),
            ("http://10.0.0.1:5000/", "http://10.0.0.1:5001/", true),
            ("http://10.0.0.1:5000/", "http://10.0.0.2:5000/", false),
            ("http://[fd00::1]:5000/", "http://[fd00:0::1]:5001/", true),
        ] {
            let from: Url = from.parse().unwrap();
            let to = from.join(location).unwrap();
            assert_eq!(keeps_credentials(&from, &to), keeps, "{from} {to}");
        }
    }
}
