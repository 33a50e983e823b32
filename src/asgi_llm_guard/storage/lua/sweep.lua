-- Expire the holds of owners that are gone: what is held becomes used, since it may have been billed; slots are freed.
-- Where the shape of one of them is not known nothing is changed, and the answer is nil; with `regardless`, such a one ends
-- without its claims. At most MOST holds go at a time, for all others wait meanwhile: then the second answer is true, and
-- the client asks again until it is not.
local MOST = 1000

local function expire(owners, life, keep, regardless)
  local due, ids, names, more = {}, {}, {}, false
  for i = 1, #owners do
    local name = OPEN .. owners[i]
    local room = MOST - #ids
    local count = call('SCARD', name)
    if count > room then more = true end
    local open = count > room and call('SRANDMEMBER', name, room) or call('SMEMBERS', name)
    for j = 1, #open do ids[#ids + 1] = open[j] end
    if more then break end
  end
  for i = 1, #ids do
    local value = call('GET', HOLD .. ids[i])
    if value and state_of(value) == 'O' then
      local h = cmsgpack.unpack(value)
      local shape = shape_of(h[6])
      if not shape and not regardless then return nil end
      local claims = shape and claims_of(h, h[3], shape, 7) or {}
      names_of(claims, names)
      due[#due + 1] = {id = ids[i], at = h[3], draft = h[5], value = value, claims = claims}
    end
  end
  load_cells(names)
  table.sort(due, function(a, b)
    if a.at ~= b.at then return a.at < b.at end
    local x, y = a.id, b.id -- by bytes: `<` on strings would follow the server's locale
    for i = 1, #x do
      local one, other = string.byte(x, i), string.byte(y, i)
      if one ~= other then return other ~= nil and one < other end
    end
    return #x < #y
  end)
  local expired = {}
  for i = 1, #due do
    local actuals = {}
    for j, c in ipairs(due[i].claims) do
      if flag(c.flags, 2) then actuals[j] = 0 end
    end
    release(due[i].claims, actuals, false)
    expired[i] = due[i].id
  end
  for i = 1, #owners do -- first, see `settle`
    if more then
      call('SREM', OPEN .. owners[i], unpack(ids))
    else
      call('DEL', OPEN .. owners[i])
    end
  end
  save_cells()
  for i = 1, #due do
    local one = due[i]
    if one.draft then append(one.id, one.draft, keep, 'x', now) end
    call('SET', HOLD .. one.id, pack_array(3, {'E', now + life, one.value}), 'PX', life)
  end
  return expired, more
end

local function sweep(life, keep, regardless)
  local lapsed = call('ZRANGEBYSCORE', OWNERS, '-inf', now, 'WITHSCORES')
  local owners = {}
  for i = 1, #lapsed, 2 do owners[#owners + 1] = lapsed[i] end
  local expired, more = expire(owners, life, keep, regardless)
  if not expired or more then return expired, more end
  for i = 1, #lapsed, 2 do
    call('HSET', LAPSED, lapsed[i], lapsed[i + 1])
    call('ZREM', OWNERS, lapsed[i])
  end
  if #lapsed > 0 then call('PEXPIRE', LAPSED, KEEP) end
  return expired
end
