//! The development CA and the certificates that it gives to functions, kept between runs.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, NameConstraints,
};
use time::{Duration, OffsetDateTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;

/// Browsers may be told to trust it, and that is tedious to repeat.
const AUTHORITY_LIFE: Duration = Duration::days(5 * 365);
/// The longest that browsers accept.
const FUNCTION_LIFE: Duration = Duration::days(397);
/// What expires sooner is renewed now, so that a long run doesn't end in expired certificates.
const RENEWED_BEFORE: Duration = Duration::days(7);
/// Clocks of other machines may be slow.
const BACKDATED: Duration = Duration::days(1);

pub struct Authority {
    directory: PathBuf,
    /// The CA's certificate.
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    _lock: File,
}

/// A function's certificate and key, as files.
#[derive(Debug, PartialEq, Eq)]
pub struct Certificate {
    pub chain: PathBuf,
    pub key: PathBuf,
}

/// Where the CA is kept; only its owner can read it.
pub fn directory() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_DATA_HOME") {
        // The XDG specification: a relative path is ignored.
        Some(base) if Path::new(&base).is_absolute() => PathBuf::from(base),
        _ => PathBuf::from(std::env::var_os("HOME").context("neither XDG_DATA_HOME nor HOME is set")?)
            .join(".local/share"),
    };
    Ok(base.join("pointsman/development"))
}

impl Authority {
    /// Opens the CA, after making one if there is none that is valid for names below `domains`.
    ///
    /// It can't sign for any other name, so that a developer who trusts it trusts it with nothing else.
    pub fn open(directory: &Path, domains: &BTreeSet<String>) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let lock = File::open(directory)?;
        lock.lock().with_context(|| format!("cannot lock {}", directory.display()))?;
        let (pem, key) = match Self::kept(directory, domains) {
            Some(kept) => kept,
            None => Self::make(directory, domains)?,
        };
        let issuer = Issuer::from_ca_cert_pem(&pem, key).context("the development CA")?;
        Ok(Self { directory: directory.to_owned(), pem, issuer, _lock: lock })
    }

    pub fn certificate(&self) -> PathBuf {
        certificate_path(&self.directory)
    }

    /// The function's certificate for exactly these names: the kept one, or a new one.
    pub fn issue(&self, function: &str, names: &[String]) -> Result<Certificate> {
        let chain = self.directory.join(format!("{function}.pem"));
        let key = self.directory.join(format!("{function}.key"));
        if !(key.is_file() && self.is_current(&chain, names)) {
            let mut params = CertificateParams::new(names)?;
            params.distinguished_name.push(DnType::CommonName, function);
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            params.use_authority_key_identifier_extension = true;
            set_life(&mut params, FUNCTION_LIFE);
            let pair = KeyPair::generate()?;
            let certificate = params.signed_by(&pair, &self.issuer)?;
            write(&key, &pair.serialize_pem())?;
            write(&chain, &certificate.pem())?;
        }
        Ok(Certificate { chain, key })
    }

    fn kept(directory: &Path, domains: &BTreeSet<String>) -> Option<(String, KeyPair)> {
        let pem = fs::read_to_string(certificate_path(directory)).ok()?;
        let key = KeyPair::from_pem(&fs::read_to_string(key_path(directory)).ok()?).ok()?;
        let parsed = parse(&pem)?;
        let certificate = parsed.parse_x509().ok()?;
        (lives(&certificate) && permitted(&certificate) == *domains).then_some((pem.clone(), key))
    }

    fn make(directory: &Path, domains: &BTreeSet<String>) -> Result<(String, KeyPair)> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "Pointsman development CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: domains.iter().cloned().map(GeneralSubtree::DnsName).collect(),
            excluded_subtrees: Vec::new(),
        });
        set_life(&mut params, AUTHORITY_LIFE);
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        write(&key_path(directory), &key.serialize_pem())?;
        write(&certificate_path(directory), &pem)?;
        Ok((pem, key))
    }

    fn is_current(&self, chain: &Path, names: &[String]) -> bool {
        let Some(parsed) = fs::read_to_string(chain).ok().and_then(|pem| parse(&pem)) else { return false };
        let Some(own) = parse(&self.pem) else { return false };
        let (Ok(certificate), Ok(own)) = (parsed.parse_x509(), own.parse_x509()) else { return false };
        lives(&certificate)
            && dns_names(&certificate) == names.iter().cloned().collect()
            && certificate.verify_signature(Some(own.public_key())).is_ok()
    }
}

fn certificate_path(directory: &Path) -> PathBuf {
    directory.join("ca.pem")
}

fn key_path(directory: &Path) -> PathBuf {
    directory.join("ca.key")
}

fn set_life(params: &mut CertificateParams, life: Duration) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATED;
    params.not_after = params.not_before + life;
}

/// Replaces the file as a whole; the directory keeps others away, the mode keeps it so for a copy.
fn write(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    let open = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&new, path)
    };
    open().with_context(|| format!("cannot write {}", path.display()))
}

fn parse(pem: &str) -> Option<Pem> {
    Pem::iter_from_buffer(pem.as_bytes()).next()?.ok()
}

fn lives(certificate: &X509Certificate<'_>) -> bool {
    let soon = OffsetDateTime::now_utc() + RENEWED_BEFORE;
    certificate.validity().not_after.timestamp() > soon.unix_timestamp()
}

fn dns_names(certificate: &X509Certificate<'_>) -> BTreeSet<String> {
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    names.iter().filter_map(dns_name).collect()
}

fn permitted(authority: &X509Certificate<'_>) -> BTreeSet<String> {
    let constraints = authority.name_constraints().ok().flatten();
    let subtrees = constraints.and_then(|constraints| constraints.value.permitted_subtrees.as_deref());
    subtrees.unwrap_or_default().iter().filter_map(|subtree| dns_name(&subtree.base)).collect()
}

fn dns_name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn domains(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn read(certificate: &Certificate) -> (String, String) {
        (fs::read_to_string(&certificate.chain).unwrap(), fs::read_to_string(&certificate.key).unwrap())
    }

    #[test]
    fn certificates_are_kept_until_their_names_or_their_authority_change() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("a/b");
        let echo = names(&["echo.faas.local", "echo.localhost"]);
        let issue = |domains: &BTreeSet<String>, names: &[String]| {
            read(&Authority::open(&directory, domains).unwrap().issue("echo", names).unwrap())
        };
        let both = domains(&["faas.local", "localhost"]);
        let first = issue(&both, &echo);
        assert_eq!(issue(&both, &echo), first);
        let more = names(&["echo.faas.local", "echo.localhost", "e.localhost"]);
        let second = issue(&both, &more);
        assert_ne!(second, first);
        assert_eq!(issue(&both, &more), second);
        let all = domains(&["faas.local", "localhost", "example.org"]);
        assert_ne!(issue(&all, &more), second);
    }

    #[test]
    fn what_is_damaged_is_made_anew() {
        let root = tempfile::tempdir().unwrap();
        let wanted = domains(&["localhost"]);
        let issue = || {
            let authority = Authority::open(root.path(), &wanted).unwrap();
            authority.issue("echo", &names(&["echo.localhost"])).unwrap()
        };
        let certificate = issue();
        let first = read(&certificate);
        fs::remove_file(&certificate.key).unwrap();
        let second = read(&issue());
        assert_ne!(second, first);
        fs::write(root.path().join("ca.pem"), "damaged").unwrap();
        assert_ne!(read(&issue()), second);
    }

    #[test]
    fn only_the_owner_can_read_them() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("development");
        let authority = Authority::open(&directory, &domains(&["localhost"])).unwrap();
        authority.issue("echo", &names(&["echo.localhost"])).unwrap();
        assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o777, 0o700);
        let files: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 4, "{files:?}");
        for file in files {
            assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600, "{}", file.display());
        }
    }

    #[test]
    fn the_authority_signs_for_its_domains_only_and_the_function_for_its_names() {
        let root = tempfile::tempdir().unwrap();
        let wanted = domains(&["faas.local", "localhost"]);
        let authority = Authority::open(root.path(), &wanted).unwrap();
        let own = parse(&authority.pem).unwrap();
        let own = own.parse_x509().unwrap();
        assert!(own.is_ca() && lives(&own));
        assert_eq!(permitted(&own), wanted);
        let certificate = authority.issue("echo", &names(&["echo.localhost"])).unwrap();
        let pem = parse(&read(&certificate).0).unwrap();
        let parsed = pem.parse_x509().unwrap();
        assert_eq!(dns_names(&parsed), domains(&["echo.localhost"]));
        assert!(!parsed.is_ca());
        assert!(parsed.verify_signature(Some(own.public_key())).is_ok());
    }
}
