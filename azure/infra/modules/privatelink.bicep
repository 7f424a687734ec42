// One private endpoint, its name zones, and their link to the network.
param name string
param location string
param tags object
param networkId string
param subnetId string
param targetId string
param group string
param zones array

resource zone 'Microsoft.Network/privateDnsZones@2020-06-01' = [for item in zones: {
  name: item
  location: 'global'
  tags: tags
}]

resource known 'Microsoft.Network/privateDnsZones/virtualNetworkLinks@2020-06-01' = [for (item, i) in zones: {
  parent: zone[i]
  name: 'link-${uniqueString(networkId)}'
  location: 'global'
  tags: tags
  properties: {
    registrationEnabled: false
    virtualNetwork: {
      id: networkId
    }
  }
}]

resource door 'Microsoft.Network/privateEndpoints@2023-11-01' = {
  name: name
  location: location
  tags: tags
  properties: {
    subnet: {
      id: subnetId
    }
    privateLinkServiceConnections: [
      {
        name: name
        properties: {
          privateLinkServiceId: targetId
          groupIds: [
            group
          ]
        }
      }
    ]
  }
}

resource names 'Microsoft.Network/privateEndpoints/privateDnsZoneGroups@2023-11-01' = {
  parent: door
  name: 'default'
  properties: {
    privateDnsZoneConfigs: [for (item, i) in zones: {
      name: replace(item, '.', '-')
      properties: {
        privateDnsZoneId: zone[i].id
      }
    }]
  }
}
