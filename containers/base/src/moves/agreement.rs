//! The key agreement between two instances: a TLS 1.3 handshake in which both prove who they are with their functions'
//! certificates, carried flight by flight by a gateway that learns nothing of its outcome.
use std::{
    fmt,
    io::{self, Read, Write},
    ops::DerefMut,
    sync::Arc,
};

use common::FunctionName;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, ConnectionCommon, DigitallySignedStruct,
    DistinguishedName, RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    server::{
        VerifierBuilderError,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use zeroize::Zeroizing;

use super::sealing::{KEY_ID_BYTES, PairSecret, SECRET_BYTES};

/// Nothing else that speaks TLS with these certificates offers or accepts it, so no other handshake's flights can be
/// led here, nor these elsewhere.
const ALPN: &[u8] = b"pointsman-move/1";

const SECRET_LABEL: &[u8] = b"EXPERIMENTAL pointsman move secret";
const ID_LABEL: &[u8] = b"EXPERIMENTAL pointsman move key id";

/// What the responder says when it knows the key; before that, nothing must be sealed with it.
const READY: &[u8; 1] = b"!";

/// The certificates and anchors of one function.
#[derive(Clone)]
pub struct Agreements {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    identity: Arc<SingleCertAndKey>,
    domains: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum AgreementError {
    #[error("{0:?} is not a domain")]
    Domain(String),
    #[error("the trust anchors can't be used: {0}")]
    Anchors(#[from] VerifierBuilderError),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error("its flights make no handshake: {0}")]
    Flight(#[from] io::Error),
    #[error("it ended its side")]
    Closed,
}

/// What is to be sent, and what was agreed on if that is done.
#[derive(Default)]
pub struct Step {
    pub reply: Vec<u8>,
    pub agreed: Option<PairSecret>,
}

/// A failure, and what the other end should hear of it.
pub struct Failure {
    pub reply: Vec<u8>,
    pub error: AgreementError,
}

impl Agreements {
    pub fn new(identity: Arc<CertifiedKey>, roots: RootCertStore, domains: Vec<String>) -> Self {
        Self {
            provider: Arc::new(ring::default_provider()),
            roots: Arc::new(roots),
            identity: Arc::new(SingleCertAndKey::from(identity)),
            domains,
        }
    }

    /// Begins an agreement with an instance of this function.
    pub fn initiate(&self, function: &FunctionName) -> Result<(Initiator, Vec<u8>), AgreementError> {
        let verifier = self.verifier(function)?;
        let name = verifier.names[0].clone();
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::<SingleCertAndKey>::clone(&self.identity));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        let mut connection = ClientConnection::new(Arc::new(config), name)?;
        let first = outgoing(&mut connection)?;
        Ok((Initiator(connection), first))
    }

    /// Takes part in an agreement that an instance of this function has begun, or so it says.
    pub fn respond(&self, function: &FunctionName) -> Result<Responder, AgreementError> {
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(self.verifier(function)?)
            .with_cert_resolver(Arc::<SingleCertAndKey>::clone(&self.identity));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(Responder(ServerConnection::new(Arc::new(config))?))
    }

    fn verifier(&self, function: &FunctionName) -> Result<Arc<Verifier>, AgreementError> {
        let name = |domain: &String| {
            ServerName::try_from(format!("{function}.{domain}"))
                .map_err(|_| AgreementError::Domain(domain.clone()))
        };
        let names = self.domains.iter().map(name).collect::<Result<Vec<_>, _>>()?;
        if names.is_empty() {
            return Err(AgreementError::Domain(String::new()));
        }
        let webpki =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider))
                .build()?;
        Ok(Arc::new(Verifier { webpki, names }))
    }
}

pub struct Initiator(ClientConnection);

impl Initiator {
    pub fn take(&mut self, flight: &[u8]) -> Result<Step, Failure> {
        let mut ready = Vec::new();
        take(&mut self.0, flight, &mut ready)?;
        let agreed = match &ready[..] {
            [] => None,
            ready if ready == READY => Some(export(&self.0).map_err(silent)?),
            _ => return Err(silent(io::Error::from(io::ErrorKind::InvalidData))),
        };
        Ok(Step { reply: outgoing(&mut self.0).map_err(silent)?, agreed })
    }
}

pub struct Responder(ServerConnection);

impl Responder {
    pub fn take(&mut self, flight: &[u8]) -> Result<Step, Failure> {
        let mut nothing = Vec::new();
        take(&mut self.0, flight, &mut nothing)?;
        if !nothing.is_empty() {
            return Err(silent(io::Error::from(io::ErrorKind::InvalidData)));
        }
        let mut step = Step::default();
        if !self.0.is_handshaking() {
            step.agreed = Some(export(&self.0).map_err(silent)?);
            self.0.writer().write_all(READY).map_err(silent)?;
        }
        step.reply = outgoing(&mut self.0).map_err(silent)?;
        Ok(step)
    }
}

/// Whose certificate is good for one of the names; the same for both ends, since functions' certificates are servers'.
#[derive(Debug)]
struct Verifier {
    webpki: Arc<WebPkiServerVerifier>,
    /// At least one.
    names: Vec<ServerName<'static>>,
}

impl Verifier {
    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let mut result = Err(CertificateError::NotValidForName.into());
        for name in &self.names {
            result = self.webpki.verify_server_cert(end_entity, intermediates, name, &[], now).map(|_| ());
            if result.is_ok() {
                break;
            }
        }
        result
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// Feeds a flight, and appends what the other end said under the handshake's protection.
fn take<D>(
    connection: &mut impl DerefMut<Target = ConnectionCommon<D>>,
    mut flight: &[u8],
    said: &mut Vec<u8>,
) -> Result<(), Failure> {
    while !flight.is_empty() {
        if connection.read_tls(&mut flight).map_err(silent)? == 0 {
            return Err(silent(AgreementError::Closed));
        }
        let state = match connection.process_new_packets() {
            Ok(state) => state,
            // Its alert tells the other end why.
            Err(error) => {
                let reply = outgoing(connection).unwrap_or_default();
                return Err(Failure { reply, error: error.into() });
            }
        };
        if state.plaintext_bytes_to_read() > READY.len() {
            return Err(silent(io::Error::from(io::ErrorKind::InvalidData)));
        }
        let begun = said.len();
        said.resize(begun + state.plaintext_bytes_to_read(), 0);
        connection.reader().read_exact(&mut said[begun..]).map_err(silent)?;
        if state.peer_has_closed() {
            return Err(silent(AgreementError::Closed));
        }
    }
    Ok(())
}

fn outgoing<D>(connection: &mut impl DerefMut<Target = ConnectionCommon<D>>) -> Result<Vec<u8>, io::Error> {
    let mut flight = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut flight)?;
    }
    Ok(flight)
}

fn export<D>(
    connection: &impl std::ops::Deref<Target = ConnectionCommon<D>>,
) -> Result<PairSecret, AgreementError> {
    let mut secret = Zeroizing::new([0; SECRET_BYTES]);
    connection.export_keying_material(&mut secret[..], SECRET_LABEL, None)?;
    let id = connection.export_keying_material([0; KEY_ID_BYTES], ID_LABEL, None)?;
    Ok(PairSecret { id, secret })
}

/// A failure that the other end isn't told of.
fn silent(error: impl Into<AgreementError>) -> Failure {
    Failure { reply: Vec::new(), error: error.into() }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use rustls_pki_types::PrivateKeyDer;

    use super::*;

    struct Authority(CertifiedIssuer<'static, KeyPair>);

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::new([]).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
        }

        fn function(&self, name: &str) -> Arc<CertifiedKey> {
            let key = KeyPair::generate().unwrap();
            let certificate =
                CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.0).unwrap();
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            let key = ring::sign::any_supported_type(&key).unwrap();
            Arc::new(CertifiedKey::new(vec![certificate.der().clone()], key))
        }

        fn agreements(&self, name: &str) -> Agreements {
            self.trusted_by(self.function(name))
        }

        fn trusted_by(&self, identity: Arc<CertifiedKey>) -> Agreements {
            let mut roots = RootCertStore::empty();
            roots.add(self.0.der().clone()).unwrap();
            Agreements::new(identity, roots, vec!["faas.local".to_owned(), "localhost".to_owned()])
        }
    }

    fn name(text: &str) -> FunctionName {
        text.parse().unwrap()
    }

    type Outcome = (Result<PairSecret, AgreementError>, Result<PairSecret, AgreementError>);

    /// Runs both ends; `tamper` may change each flight.
    fn agree(
        initiator: (&Agreements, &str),
        responder: (&Agreements, &str),
        mut tamper: impl FnMut(&mut Vec<u8>),
    ) -> Outcome {
        let (mut first, mut flight) = initiator.0.initiate(&name(initiator.1)).unwrap();
        let mut second = responder.0.respond(&name(responder.1)).unwrap();
        let (mut ours, mut theirs) = (Err(AgreementError::Closed), Err(AgreementError::Closed));
        loop {
            tamper(&mut flight);
            let reply = match second.take(&flight) {
                Ok(step) => {
                    step.agreed.into_iter().for_each(|agreed| theirs = Ok(agreed));
                    step.reply
                }
                Err(failure) => {
                    theirs = Err(failure.error);
                    failure.reply
                }
            };
            if reply.is_empty() {
                return (ours, theirs);
            }
            flight = match first.take(&reply) {
                Ok(step) => {
                    step.agreed.into_iter().for_each(|agreed| ours = Ok(agreed));
                    step.reply
                }
                Err(failure) => {
                    ours = Err(failure.error);
                    failure.reply
                }
            };
            if flight.is_empty() {
                return (ours, theirs);
            }
        }
    }

    #[test]
    fn both_ends_agree_on_a_secret_that_is_new_each_time() {
        let authority = Authority::new();
        let echo = authority.agreements("echo.faas.local");
        // One of the domains is enough.
        let hello = authority.agreements("hello.localhost");
        let mut seen = Vec::new();
        for _ in 0..2 {
            let (ours, theirs) = agree((&echo, "hello"), (&hello, "echo"), |_| {});
            let (ours, theirs) = (ours.unwrap(), theirs.unwrap());
            assert_eq!((ours.id, &ours.secret[..]), (theirs.id, &theirs.secret[..]));
            assert!(!seen.contains(&ours.id) && !seen.contains(&theirs.id));
            seen.push(ours.id);
        }
    }

    #[test]
    fn who_can_not_prove_who_it_is_gets_nothing() {
        let (authority, other) = (Authority::new(), Authority::new());
        let echo = authority.agreements("echo.faas.local");
        let hello = authority.agreements("hello.faas.local");
        let stranger = authority.trusted_by(other.function("hello.faas.local"));
        let elsewhere = authority.agreements("hello.example.org");
        for impostor in [&stranger, &elsewhere, &echo] {
            let (ours, theirs) = agree((&echo, "hello"), (impostor, "echo"), |_| {});
            assert!(ours.is_err() && theirs.is_err());
            // As the one who begins, in the name of hello.
            let (ours, theirs) = agree((impostor, "echo"), (&echo, "hello"), |_| {});
            assert!(ours.is_err() && theirs.is_err());
        }
        assert!(agree((&echo, "hello"), (&hello, "echo"), |_| {}).0.is_ok());
    }

    #[test]
    fn an_altered_flight_ends_the_agreement() {
        let authority = Authority::new();
        let echo = authority.agreements("echo.faas.local");
        let hello = authority.agreements("hello.faas.local");
        for altered in 0..2 {
            let mut count = 0;
            let (ours, theirs) = agree((&echo, "hello"), (&hello, "echo"), |flight| {
                if count == altered {
                    let last = flight.len() - 1;
                    flight[last] ^= 1;
                }
                count += 1;
            });
            assert!(ours.is_err() && theirs.is_err(), "{altered}");
        }
    }
}
