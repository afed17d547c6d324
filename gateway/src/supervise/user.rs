//! Whom a function runs as.
use std::{collections::BTreeSet, ffi::CString, ops::RangeInclusive};

use anyhow::{Context as _, Result, bail};
use common::FunctionName;
use nix::unistd::{self, getgrouplist};
use rustix::process::{Gid, RawUid, Uid};

/// Where distributions leave room for users that exist only while a service runs (systemd's DynamicUser).
const DYNAMIC: RangeInclusive<RawUid> = 61_184..=65_519;

/// To the kernel not an id but "leave it as it is".
const NO_ID: RawUid = RawUid::MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: Uid,
    pub gid: Gid,
    pub groups: Vec<Gid>,
}

/// The users of one supervisor's functions.
#[derive(Default)]
pub struct Users {
    taken: BTreeSet<RawUid>,
}

impl Users {
    /// The user to change to, or `None` to stay `own`. A function that isn't told otherwise shares its user with nobody:
    /// it can touch no file, and send no signal to another function.
    pub fn of_function(
        &mut self,
        name: FunctionName,
        configured: Option<&str>,
        own: Uid,
    ) -> Result<Option<User>> {
        match configured {
            Some(user) if own.is_root() => {
                let user = User::find(user)?;
                self.taken.insert(user.uid.as_raw());
                Ok(Some(user))
            }
            Some(user) if User::find(user)?.uid == own => Ok(None),
            Some(user) => bail!("only root can run it as user {user}, and this is user {}", own.as_raw()),
            None if own.is_root() => self.unshared(name).map(Some),
            None => Ok(None),
        }
    }

    /// The same one at each start, as long as it is free.
    fn unshared(&mut self, name: FunctionName) -> Result<User> {
        let count = DYNAMIC.end() - DYNAMIC.start() + 1;
        let first = hash(name.as_bytes()) % count;
        let candidates = (0..count).map(|step| DYNAMIC.start() + (first + step) % count);
        for uid in candidates {
            let is_listed = || matches!(unistd::User::from_uid(unistd::Uid::from_raw(uid)), Ok(Some(_)));
            if !self.taken.contains(&uid) && !is_listed() {
                self.taken.insert(uid);
                return Ok(User::bare(uid));
            }
        }
        bail!("no user from {} to {} is free", DYNAMIC.start(), DYNAMIC.end());
    }
}

/// FNV-1a, which is the same in every build.
fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

impl User {
    /// By name or, if nobody has that name, by number.
    fn find(user: &str) -> Result<Self> {
        let failed = || format!("the users' list can't be searched for {user}");
        if let Some(found) = unistd::User::from_name(user).with_context(failed)? {
            return Self::listed(found);
        }
        let Some(uid) = user.parse().ok().filter(|&uid| uid != NO_ID) else {
            bail!("there is no user {user}");
        };
        match unistd::User::from_uid(unistd::Uid::from_raw(uid)).with_context(failed)? {
            Some(found) => Self::listed(found),
            None => Ok(Self::bare(uid)),
        }
    }

    fn listed(user: unistd::User) -> Result<Self> {
        let name = CString::new(user.name.as_str()).context("a user's name has a NUL")?;
        let groups = getgrouplist(&name, user.gid)
            .with_context(|| format!("the groups of user {} can't be found", user.name))?;
        Ok(Self {
            uid: Uid::from_raw(user.uid.as_raw()),
            gid: Gid::from_raw(user.gid.as_raw()),
            groups: groups.into_iter().map(|group| Gid::from_raw(group.as_raw())).collect(),
        })
    }

    /// A number that no user has, with the group of the same number.
    fn bare(id: u32) -> Self {
        Self { uid: Uid::from_raw(id), gid: Gid::from_raw(id), groups: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Uid {
        Uid::from_raw(1234)
    }

    fn of(configured: Option<&str>, own: Uid) -> Result<Option<u32>, String> {
        let user = Users::default().of_function("echo".parse().unwrap(), configured, own);
        let user = user.map_err(|error| format!("{error:#}"))?;
        Ok(user.map(|user| user.uid.as_raw()))
    }

    #[test]
    fn root_changes_to_whom_it_is_told() {
        assert_eq!(of(Some("nobody"), Uid::ROOT), Ok(Some(65_534)));
        assert_eq!(of(Some("root"), Uid::ROOT), Ok(Some(0)));
        assert_eq!(of(Some("4000000001"), Uid::ROOT), Ok(Some(4_000_000_001)));
    }

    #[test]
    fn each_function_of_root_has_a_user_of_its_own_at_each_start() {
        let start = || {
            let mut users = Users::default();
            let mut of = |name: String| users.of_function(name.parse().unwrap(), None, Uid::ROOT);
            let users = (0..2000).map(|number| of(format!("f{number}")).unwrap().unwrap());
            users.map(|user| (user.uid.as_raw(), user.gid.as_raw(), user.groups.len())).collect::<Vec<_>>()
        };
        let users = start();
        assert!(users.iter().all(|&(uid, gid, groups)| DYNAMIC.contains(&uid) && (gid, groups) == (uid, 0)));
        assert_eq!(users.iter().collect::<BTreeSet<_>>().len(), users.len());
        assert_eq!(start(), users);
    }

    #[test]
    fn who_is_not_root_stays() {
        assert_eq!(of(None, own()), Ok(None));
        assert_eq!(of(Some("1234"), own()), Ok(None));
        assert!(of(Some("root"), own()).unwrap_err().contains("only root can run it as user root"));
    }

    #[test]
    fn what_is_no_user_is_refused() {
        for user in ["", "no such user", "-1", "4294967295", "4294967296"] {
            assert_eq!(of(Some(user), Uid::ROOT), Err(format!("there is no user {user}")));
        }
    }

    #[test]
    fn a_listed_user_has_its_groups() {
        let root = User::find("root").unwrap();
        assert!(root.gid.as_raw() == 0 && root.groups.contains(&Gid::ROOT), "{root:?}");
        assert_eq!(User::find("0").unwrap(), root);
        assert_eq!(User::bare(7).groups, []);
    }
}
