//! A token server (distribution's "token authentication specification" and its OAuth 2 variant): it knows users with passwords
//! and who may have what, signs what docker-registry believes, and notes what it was asked.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::certificates::ServerCertificate;
use super::host::Host;
use crate::origin::http::{Connection, Request};

const PORT: u16 = 5001;
/// The issuer that docker-registry expects.
pub(super) const ISSUER: &str = "the lab's token server";
pub(super) const SERVICE: &str = "the lab's registry";

/// A running token server. Its grants can be changed at any time; a token that it gave out stays good for its life.
#[derive(Debug)]
pub struct TokenServer {
    state: Arc<State>,
    realm: String,
    bundle: PathBuf,
    /// Ends with it, and all its connections with that.
    _runtime: tokio::runtime::Runtime,
}

/// A request for a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenAsked {
    /// `GET`, or `POST` for the OAuth 2 variant.
    pub method: String,
    /// The user with the right password; `None` for anonymous callers and for wrong passwords.
    pub user: Option<String>,
    /// The scopes asked for.
    pub scopes: Vec<String>,
    /// Of those, what was granted: empty for a token that is good for nothing.
    pub granted: Vec<String>,
    /// The status answered.
    pub status: u16,
}

struct State {
    rules: Mutex<Rules>,
    log: Mutex<Vec<TokenAsked>>,
    signer: Signer,
}

/// The rights of users.
#[derive(Debug)]
struct Rules {
    passwords: HashMap<String, String>,
    /// The users that may pull and push, by repository.
    members: HashMap<String, HashSet<String>>,
    /// Repositories that everybody may pull.
    public: HashSet<String>,
    life: Duration,
    oauth: bool,
}

impl TokenServer {
    /// Starts one on port 5001 of `host`, by plain HTTP. It knows nobody and allows nothing; tokens live for five minutes.
    ///
    /// # Errors
    /// When it cannot listen there.
    pub fn start(host: &Host) -> Result<Self> {
        Self::listen(host, None)
    }

    /// The same by HTTPS.
    ///
    /// # Errors
    /// As [`TokenServer::start`].
    pub fn start_tls(host: &Host, certificate: &ServerCertificate) -> Result<Self> {
        Self::listen(host, Some(TlsAcceptor::from(certificate.tls()?)))
    }

    fn listen(host: &Host, tls: Option<TlsAcceptor>) -> Result<Self> {
        let signer = Signer::new()?;
        let bundle = host.dir().join("tokens.crt");
        fs::write(&bundle, &signer.certificate_pem)?;
        let rules = Rules {
            passwords: HashMap::new(),
            members: HashMap::new(),
            public: HashSet::new(),
            life: Duration::from_secs(300),
            oauth: true,
        };
        let state = Arc::new(State {
            rules: Mutex::new(rules),
            log: Mutex::default(),
            signer,
        });
        let scheme = if tls.is_some() { "https" } else { "http" };
        let realm = format!("{scheme}://{}/token", host.at(PORT));
        let runtime = host.runtime(1)?;
        let listener = host
            .enter(|| std::net::TcpListener::bind(host.at(PORT)))?
            .context("the token server")?;
        listener.set_nonblocking(true)?;
        let listener = {
            let _inside = runtime.enter();
            TcpListener::from_std(listener)?
        };
        runtime.spawn(serve(listener, tls, Arc::clone(&state)));
        Ok(Self {
            state,
            realm,
            bundle,
            _runtime: runtime,
        })
    }

    /// The endpoint of tokens: the `realm` of challenges.
    #[must_use]
    pub fn realm(&self) -> &str {
        &self.realm
    }

    /// The certificates (PEM) that its signatures are checked with: docker-registry's `rootcertbundle`.
    #[must_use]
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Knows a user from now on, or changes a password.
    pub fn user(&self, name: &str, password: &str) {
        self.state
            .rules()
            .passwords
            .insert(name.into(), password.into());
    }

    /// Lets exactly these users pull from and push to a repository from now on.
    pub fn private(&self, repository: &str, users: &[&str]) {
        let users = users.iter().map(|&user| user.to_owned()).collect();
        self.state.rules().members.insert(repository.into(), users);
    }

    /// Lets everybody pull from a repository.
    pub fn public(&self, repository: &str) {
        self.state.rules().public.insert(repository.into());
    }

    /// How long tokens given out from now on are good. docker-registry adds a minute of its own to that.
    pub fn life(&self, life: Duration) {
        self.state.rules().life = life;
    }

    /// Whether the OAuth 2 variant is offered; without it POST is 405, as older servers have it.
    pub fn oauth(&self, offered: bool) {
        self.state.rules().oauth = offered;
    }

    /// The requests so far.
    #[must_use]
    pub fn log(&self) -> Vec<TokenAsked> {
        lock(&self.state.log).clone()
    }

    /// Forgets what it was asked.
    pub fn clear_log(&self) {
        lock(&self.state.log).clear();
    }

    /// A token as a client would get it: for `user` (everybody without one), good for pulling from `repository` if the user
    /// may, and in vain otherwise.
    #[must_use]
    pub fn token(&self, user: Option<&str>, repository: &str) -> String {
        let rules = self.state.rules();
        let granted = rules.grant(user, &[format!("repository:{repository}:pull")]);
        self.state.signer.token(user, &granted, rules.life)
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("rules", &self.rules)
            .field("log", &self.log)
            .finish_non_exhaustive()
    }
}

impl State {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        lock(&self.rules)
    }
}

/// A panic while a lock is held fails its test anyway; the others may go on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, state: Arc<State>) {
    loop {
        // A failed accept concerns a client that is gone.
        if let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(converse(tcp, tls.clone(), Arc::clone(&state)));
        }
    }
}

async fn converse(
    tcp: TcpStream,
    tls: Option<TlsAcceptor>,
    state: Arc<State>,
) -> std::io::Result<()> {
    let mut connection = Connection::accept(tcp, tls.as_ref()).await?;
    while let Some(request) = connection.request().await? {
        let (status, value) = state.answer(&request);
        connection.write_json(status, &value).await?;
    }
    Ok(())
}

/// The caller.
enum Caller {
    Anonymous,
    User(String),
    /// A user that is not known, or the password of nobody.
    Stranger,
}

impl State {
    fn answer(&self, request: &Request) -> (u16, Value) {
        if request.path() != "/token" {
            return (404, refusal("UNSUPPORTED", "tokens are at /token"));
        }
        let rules = self.rules();
        let (caller, scopes) = match request.method.as_str() {
            "GET" => from_query(&rules, request),
            "POST" if rules.oauth => from_form(&rules, request),
            _ => {
                return self.note(
                    request,
                    None,
                    Vec::new(),
                    Vec::new(),
                    405,
                    refusal("UNSUPPORTED", "GET only"),
                );
            }
        };
        let user = match caller {
            Caller::Stranger => {
                let value = refusal("UNAUTHORIZED", "incorrect username or password");
                return self.note(request, None, scopes, Vec::new(), 401, value);
            }
            Caller::Anonymous => None,
            Caller::User(name) => Some(name),
        };
        let granted = rules.grant(user.as_deref(), &scopes);
        let token = self.signer.token(user.as_deref(), &granted, rules.life);
        let life_s = rules.life.as_secs();
        let value = if request.method == "POST" {
            json!({ "access_token": token, "expires_in": life_s, "scope": scopes.join(" ") })
        } else {
            json!({ "token": token, "expires_in": life_s })
        };
        self.note(
            request,
            user,
            scopes,
            granted.iter().map(Scope::to_string).collect(),
            200,
            value,
        )
    }

    fn note(
        &self,
        request: &Request,
        user: Option<String>,
        scopes: Vec<String>,
        granted: Vec<String>,
        status: u16,
        value: Value,
    ) -> (u16, Value) {
        lock(&self.log).push(TokenAsked {
            method: request.method.clone(),
            user,
            scopes,
            granted,
            status,
        });
        (status, value)
    }
}

fn refusal(code: &str, message: &str) -> Value {
    json!({ "errors": [{ "code": code, "message": message }] })
}

/// `GET /token?service=…&scope=…&scope=…`, with Basic credentials or none.
fn from_query(rules: &Rules, request: &Request) -> (Caller, Vec<String>) {
    let query = request
        .target
        .split_once('?')
        .map(|(_, query)| query)
        .unwrap_or_default();
    let caller = match request.header("authorization") {
        None => Caller::Anonymous,
        Some(given) => given
            .strip_prefix("Basic ")
            .and_then(|given| String::from_utf8(STANDARD.decode(given).ok()?).ok())
            .and_then(|given| rules.known(given.split_once(':')?))
            .map_or(Caller::Stranger, Caller::User),
    };
    let scopes = pairs(query)
        .filter(|(name, _)| name == "scope")
        .map(|(_, scope)| scope);
    (caller, scopes.collect())
}

/// `POST /token` with a form: the password grant (RFC 6749, 4.3), scopes in one field.
fn from_form(rules: &Rules, request: &Request) -> (Caller, Vec<String>) {
    let form = String::from_utf8_lossy(&request.body);
    let form: HashMap<String, String> = pairs(&form).collect();
    let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
    let known = rules.known((field("username"), field("password")));
    let caller = known
        .filter(|_| field("grant_type") == "password")
        .map_or(Caller::Stranger, Caller::User);
    (
        caller,
        field("scope")
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
    )
}

/// The pairs of a query or a form.
fn pairs(text: &str) -> impl Iterator<Item = (String, String)> {
    url::form_urlencoded::parse(text.as_bytes()).map(|(name, value)| (name.into(), value.into()))
}

/// `repository:NAME:ACTIONS`
struct Scope {
    repository: String,
    actions: Vec<String>,
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "repository:{}:{}",
            self.repository,
            self.actions.join(",")
        )
    }
}

impl Rules {
    /// The user's name, if the password is right.
    fn known(&self, (name, password): (&str, &str)) -> Option<String> {
        (self.passwords.get(name)? == password).then(|| name.to_owned())
    }

    /// The scopes that this user (everybody, without one) may have; like all token servers, it refuses by granting
    /// less.
    fn grant(&self, user: Option<&str>, scopes: &[String]) -> Vec<Scope> {
        let wanted = scopes
            .iter()
            .filter_map(|scope| scope.strip_prefix("repository:")?.rsplit_once(':'));
        let granted = wanted.map(|(repository, actions)| {
            let members = self.members.get(repository);
            let member =
                user.is_some_and(|user| members.is_some_and(|members| members.contains(user)));
            let public = self.public.contains(repository);
            let may = |action: &&str| member || public && *action == "pull";
            let actions = actions.split(',').filter(may).map(str::to_owned).collect();
            Scope {
                repository: repository.into(),
                actions,
            }
        });
        granted.filter(|scope| !scope.actions.is_empty()).collect()
    }
}

/// Signs tokens with a key whose certificate goes along.
struct Signer {
    key: EcdsaKeyPair,
    random: SystemRandom,
    certificate_pem: String,
    certificate: String,
}

impl Signer {
    fn new() -> Result<Self> {
        let key = rcgen::KeyPair::generate()?;
        let certificate = rcgen::CertificateParams::default().self_signed(&key)?;
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P256_SHA256_FIXED_SIGNING,
            &key.serialize_der(),
            &random,
        )
        .map_err(|refused| anyhow::anyhow!("the token server's key: {refused}"))?;
        Ok(Self {
            key,
            random,
            certificate_pem: certificate.pem(),
            certificate: STANDARD.encode(certificate.der()),
        })
    }

    /// A JSON web token (RFC 7519) with the claims of the token authentication specification.
    fn token(&self, user: Option<&str>, granted: &[Scope], life: Duration) -> String {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let access: Vec<_> = granted
            .iter()
            .map(|scope| json!({ "type": "repository", "name": scope.repository, "actions": scope.actions }))
            .collect();
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [self.certificate] });
        let claims = json!({
            "iss": ISSUER, "sub": user.unwrap_or_default(), "aud": SERVICE,
            "iat": now, "nbf": now, "exp": now + life.as_secs(), "jti": rand::random::<u64>().to_string(),
            "access": access,
        });
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let signature = self
            .key
            .sign(&self.random, signed.as_bytes())
            .expect("signing fails only where the system has no random numbers");
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            passwords: HashMap::from([("ann".into(), "a:b c".into())]),
            members: HashMap::from([("team/app".into(), HashSet::from(["ann".into()]))]),
            public: HashSet::from(["base".into()]),
            life: Duration::from_secs(60),
            oauth: true,
        }
    }

    #[test]
    fn users_get_what_is_theirs_and_nobody_more_than_pull_of_what_is_public() {
        let granted = |user: Option<&str>, scope: &str| {
            let granted = rules().grant(user, &[scope.to_owned()]);
            granted
                .iter()
                .map(Scope::to_string)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            granted(Some("ann"), "repository:team/app:pull,push"),
            "repository:team/app:pull,push"
        );
        assert_eq!(granted(Some("bob"), "repository:team/app:pull"), "");
        assert_eq!(granted(None, "repository:team/app:pull"), "");
        assert_eq!(
            granted(None, "repository:base:pull,push"),
            "repository:base:pull"
        );
        assert_eq!(granted(Some("ann"), "registry:catalog:*"), "");
    }

    #[test]
    fn only_the_right_password_makes_a_user() {
        let form = "password=a%3Ab+c&scope=repository%3Ax%3Apull%20y";
        let pairs: HashMap<_, _> = pairs(form).collect();
        assert_eq!(pairs["scope"], "repository:x:pull y");
        assert_eq!(
            rules().known(("ann", &pairs["password"])).as_deref(),
            Some("ann")
        );
        assert_eq!(rules().known(("ann", "a")), None);
        assert_eq!(rules().known(("bob", "a:b c")), None);
    }
}
